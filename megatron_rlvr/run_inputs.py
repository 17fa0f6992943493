"""Fingerprints of the files that a run reads, so that a file that was exchanged between two starts is noticed.

``inputs.json`` of the run directory holds the SHA-256 of every file that determines what the run trains on: the data,
the tokenizer and generation settings of the model folder, and the ids in its config.json that end a completion. Weights
and the rest of config.json are not among them: the checkpoint has both.
"""

from __future__ import annotations

import importlib.machinery
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from megatron_rlvr import checksums
from megatron_rlvr.atomic_write import write_text
from megatron_rlvr.checked_input import read_json
from megatron_rlvr.config import Config
from megatron_rlvr.config_schema import names_key
from megatron_rlvr.data.config import DataSource, is_gym
from megatron_rlvr.data.gym_problems import gym_digest
from megatron_rlvr.errors import UserError
from megatron_rlvr.resume import Change

INPUTS_FILE = "inputs.json"
_REFERENCE = "reference.json"
# Of config.json, only the ends of sequences: a checkpoint knows the sizes of its model and names the one that differs.
_MODEL_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
_ENDS = "eos_token_id of config.json in model.path"
_ADDED = (_ENDS, *(f"{name} in model.path" for name in ("vocab.txt", "special_tokens_map.json", "added_tokens.json")))
"""Inputs that are not in the files of earlier versions, which lack the first of them in particular."""


def record_inputs(config: Config, resumes: bool) -> list[Change]:
    """Write the fingerprints of a new run, or compare those of a resumed run with its ``inputs.json``.

    The file of a user's verifier may change, with a warning: its author may have corrected it. Other files may change
    if ``resume.allow`` names the key that leads to them.

    Args:
        config: the configuration.
        resumes: whether the run directory has a checkpoint.

    Returns:
        what differs on a resume, with fingerprints.

    Raises:
        UserError: for the first file that differs; names it.
    """
    return _record(config, fingerprints(config), INPUTS_FILE, resumes)


def record_reference(config: Config, digests: Mapping[str, str], resumes: bool) -> list[Change]:
    """Write the checksums of the reference policy of a new run, or compare those of a resumed run.

    They are in a file of their own, because all processes of the job compute them, after rank 0 has compared the other
    inputs. Errors are those of `record_inputs`; ``resume.allow=[reference.path]`` allows a change.

    Args:
        config: the configuration.
        digests: checksums of the files of the reference, by name.
        resumes: whether the run directory has a checkpoint.

    Returns:
        what differs on a resume, with checksums.
    """
    return _record(config, {f"reference.path ({name})": sha for name, sha in digests.items()}, _REFERENCE, resumes)


def _record(config: Config, now: dict[str, str], file: str, resumes: bool) -> list[Change]:
    """Write fingerprints of a new run to a file of its directory, or compare those of a resumed run with it."""
    path = Path(config.run_directory) / file
    if not resumes or not path.is_file():
        write_text(path, json.dumps(now, indent=1) + "\n")
        return []
    before = read_json(path, remedy="remove it, if you know that what it lists has not changed")
    changes = []
    for key in {**before, **now}:
        if before.get(key) == now.get(key) or (key in _ADDED and _ENDS not in before):
            continue
        changes.append(Change(key, before.get(key), now.get(key)))
        change = "is new" if before.get(key) is None else "is missing" if now.get(key) is None else "has changed"
        if key.startswith("verifier.name"):
            print(f"warning: {key} {change} since this run began: rewards may mean something else", file=sys.stderr)
        elif not names_key(config.resume.allow, name := _key(key)):
            raise UserError(
                f"{key} {change} since the run in {path.parent} began: restore the file, or choose another "
                f"run_directory, or add resume.allow=[{','.join([*config.resume.allow, name])}] to continue with the "
                "change"
            )
    if before != now:
        write_text(path, json.dumps(now, indent=1) + "\n")
    return changes


def _key(name: str) -> str:
    """Return the key of the configuration that leads to an input."""
    return name.rpartition(" in ")[2] if " in " in name else name.partition(" (")[0]


def fingerprints(config: Config) -> dict[str, str]:
    """Return the SHA-256 of every input that exists, by the key of the configuration that leads to it.

    Of the ids that end a completion, it is their text.
    """
    model = Path(config.model.path)
    data = config.data
    problems = {f"data.train ({_name(source, data.train)})": source.path for source in data.sources()}
    if data.heldout is not None:
        problems[f"data.heldout ({Path(data.heldout).name})"] = data.heldout
    named = {key: Path(path) for key, path in problems.items() if not is_gym(path)}
    generated = {key: gym_digest(path, data.reasoning_gym) for key, path in problems.items() if is_gym(path)}
    named |= {f"{name} in model.path": model / name for name in _MODEL_FILES}
    generated[_ENDS] = _ends_of_sequence(model / "config.json")
    if ":" in config.verifier.name and (source := _source(config.verifier.name.partition(":")[0])):
        named[f"verifier.name ({source.name})"] = source
    return generated | {key: digest for key, file in named.items() if (digest := _digest(file)) is not None}


def _name(source: DataSource, train: str | list[DataSource]) -> str:
    """Return the name of a training file: of several, also by that of its source, because folders may differ."""
    file = Path(source.path).name
    return file if isinstance(train, str) else f"{source.label}: {file}"


def _ends_of_sequence(config: Path) -> str:
    """Return the ids of tokens that end a completion by a config.json, as text."""
    is_file = os.path.isfile(config)  # noqa: PTH113, Path.is_file raises for a name that is too long
    found = read_json(config, remedy="download the model again") if is_file else {}
    return json.dumps(found.get("eos_token_id"))


def _digest(path: Path) -> str | None:
    """Return the SHA-256 of a file; None if it cannot be read, which whoever needs it will report."""
    try:
        return checksums.digest(path)
    except (OSError, ValueError):
        return None


def _source(module: str) -> Path | None:
    """Return the file of a module; None if it is not found.

    Nothing is imported, not even the packages above the module: what a user's code does on import belongs in the
    worker processes.
    """
    *packages, _ = names = module.split(".")
    path: list[str] | None = None
    for depth in range(1, len(names) + 1):
        try:
            # By its last name, because a dotted name below a folder without __init__.py needs that folder imported.
            spec = importlib.machinery.PathFinder.find_spec(names[depth - 1], path)
        except (ImportError, ValueError):
            return None
        if spec is None or (depth <= len(packages) and spec.submodule_search_locations is None):
            return None
        path = list(spec.submodule_search_locations or [])
    return Path(spec.origin) if spec is not None and spec.origin is not None else None
