"""Problems of the package reasoning-gym, for data sources ``reasoning_gym:NAME``.

They are generated in a process of its own with fixed hashes of texts: five of its tasks iterate over sets, and without
that every process of a job, and every start of a run, would have other problems.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import os
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from megatron_rlvr.bound_to_parent import bound_command
from megatron_rlvr.data.config import GYM_PREFIX, ReasoningGymConfig
from megatron_rlvr.data.examples import Example, read_stratum
from megatron_rlvr.errors import UserError
from megatron_rlvr.log_tail import last_error

# Held-out problems are searched among this many times as many: tasks with few problems repeat themselves.
_MOST_ATTEMPTS = 8
Entry = dict[str, Any]


def load_gym_examples(
    path: str, config: ReasoningGymConfig, *, stratify_key: str | None = None, heldout: int | None = None
) -> list[Example]:
    """Generate the training problems of a task, or its held-out problems.

    The answer of an example is what the verifier ``reasoning_gym`` takes: the entry that the package generated, with
    the task and its options.

    Args:
        path: ``reasoning_gym:NAME``.
        config: section ``data.reasoning_gym``.
        stratify_key: dotted key of a number in the entries, such as ``metadata.difficulty.num_terms``.
        heldout: with it, generate this many held-out problems. They differ from each other and from all training
            problems; there are fewer if the task has no more.

    Raises:
        UserError: if the package is not installed, has no such task, or cannot generate it with these options.
    """
    task = path.removeprefix(GYM_PREFIX)
    options = config.options.get(task, {})
    entries = generate(task, options, config.seed, config.size, config.timeout_seconds)
    if heldout is not None:
        entries = _heldout(task, options, config, {entry["question"] for entry in entries}, heldout)
    return [
        Example(
            index=index,
            prompt=_prompt(entry["question"], config),
            answer={"reasoning_gym": task, "options": options, **entry},
            source=task,
            stratum=None if stratify_key is None else read_stratum(entry, stratify_key, f"{path}: problem {index}"),
        )
        for index, entry in enumerate(entries)
    ]


def gym_digest(path: str, config: ReasoningGymConfig) -> str:
    """Return the SHA-256 of the training problems of a task, which another version of the package may change."""
    task = path.removeprefix(GYM_PREFIX)
    entries = generate(task, config.options.get(task, {}), config.seed, config.size, config.timeout_seconds)
    text = json.dumps([(entry["question"], entry["answer"]) for entry in entries])
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _heldout(task: str, options: Entry, config: ReasoningGymConfig, training: set[str], count: int) -> list[Entry]:
    """Return up to `count` problems with other seeds than the training problems, none of which is among them."""
    chosen: dict[str, Entry] = {}
    attempts = count
    while len(chosen) < count and attempts <= _MOST_ATTEMPTS * count:
        # A task derives the seed of a problem from that of the task and the number of the problem.
        candidates = generate(task, options, config.seed + config.size, attempts, config.timeout_seconds)
        chosen = {entry["question"]: entry for entry in candidates if entry["question"] not in training}
        attempts *= 2
    if not chosen:
        raise UserError(
            f"data.heldout={GYM_PREFIX}{task}: all of its problems are among the {config.size} training problems: "
            "lower data.reasoning_gym.size, or use another task"
        )
    return list(chosen.values())[:count]


def generate(task: str, options: Entry, seed: int, size: int, timeout: float) -> list[Entry]:
    """Return `size` problems of a task, as the package has them: ``question``, ``answer`` and ``metadata``.

    Args:
        task: name of the task in the package.
        options: parameters of the task.
        seed: seed of the task.
        timeout: longest time for the generation, in seconds.

    Raises:
        UserError: see `load_gym_examples`; also if the generation takes longer than `timeout`.
    """
    return _generate(task, json.dumps(options, sort_keys=True), seed, size, timeout)


@functools.cache
def _generate(task: str, options: str, seed: int, size: int, timeout: float) -> list[Entry]:
    name = f"{GYM_PREFIX}{task}"
    if importlib.util.find_spec("reasoning_gym") is None:
        raise UserError(f"{name} needs the package reasoning-gym: pip install -e '.[reasoning-gym]' in the repository")
    with tempfile.TemporaryDirectory(prefix="reasoning_gym_") as folder:
        output, log = Path(folder) / "entries", Path(folder) / "log"
        command = [sys.executable, "-m", "megatron_rlvr.data.gym_generator"]
        command += [task, options, str(seed), str(size), str(output)]
        environment = os.environ | {"PYTHONHASHSEED": "0"}
        try:
            with log.open("wb") as file:
                done = subprocess.run(
                    bound_command(command, os.getpid()), env=environment, stdout=file, stderr=file, timeout=timeout
                )
        except subprocess.TimeoutExpired:
            raise UserError(
                f"{name}: {size} problems were not generated within data.reasoning_gym.timeout_seconds={timeout:g}: "
                "raise it, or lower data.reasoning_gym.size"
            ) from None
        if done.returncode:
            raise UserError(f"{name}: {last_error(log).removeprefix('error: ')}")
        return pickle.loads(output.read_bytes())


def _prompt(question: str, config: ReasoningGymConfig) -> str | list[dict[str, str]]:
    if not config.chat:
        return f"{config.system_prompt}\n\n{question}\n" if config.system_prompt else question
    user = {"role": "user", "content": question}
    return [{"role": "system", "content": config.system_prompt}, user] if config.system_prompt else [user]
