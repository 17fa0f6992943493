"""Continue a run, on purpose with other settings: what may change, what must be allowed, and the record of changes."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from megatron_rlvr.checked_input import shown
from megatron_rlvr.config import Config, read_config_file
from megatron_rlvr.config_reader import read
from megatron_rlvr.config_schema import keys, names_key
from megatron_rlvr.config_yaml import type_of
from megatron_rlvr.control.by_name import did_you_mean
from megatron_rlvr.errors import UserError, truncated
from megatron_rlvr.megatron import waiting
from megatron_rlvr.training.checkpoints_folder import newest_written
from megatron_rlvr.training.config import ResumeConfig

# Sections that may only change if resume.allow names the key. The others, such as steps, parallel and telemetry, may
# change.
IDENTITY = ("seed", "data", "verifier", "rollout", "algorithm", "reference", "optimizer")
# Sections that a checkpoint holds the form of, so that nothing can allow a change.
FIXED = ("lora",)
# Keys of these sections that may change: how completions are generated, stored and watched, but not how they are
# sampled, where the weights of the reference are, and the length from which prompts are refused.
MAY_CHANGE = (
    "data.max_prompt_tokens",
    *("rollout.record", "rollout.recording", "rollout.engine", "rollout.local_batch", "rollout.sglang"),
    *("rollout.mismatch_alarm", "rollout.mismatch_growth", "rollout.mismatch_stop", "rollout.mismatch_patience"),
    *("rollout.routing_replay_compare_every", "reference.weights"),
)
# Sections whose parameters belong to their name: if the name changes, they change together.
_BY_NAME = ("algorithm.schedule", "algorithm.objective")

HISTORY_FILE = "config_history.jsonl"


@dataclass(frozen=True)
class Change:
    """A setting or an input of a run that differs from its previous start."""

    key: str
    old: Any
    new: Any


def continue_run(config: Config, directory: Path) -> tuple[Config, list[Change]]:
    """Compare a configuration with that of the run in `directory`, and refuse what must not change.

    Args:
        config: configuration of the resuming process.
        directory: the run directory, with checkpoints. Nothing is compared if it has no config.yaml.

    Returns:
        the configuration with the lengths of its schedules, and what differs from the run's config.yaml.

    Raises:
        UserError: if the run has done more steps than `config` has, a setting differs that ``resume.allow`` does not
            name, or the run's config.yaml is damaged or of a version with other keys.
    """
    done = newest_written(directory / "checkpoints")
    if config.steps < done:
        raise UserError(
            f"{directory} has done {done} steps, steps={config.steps} is less: set steps to at least {done}, or choose "
            "another run_directory"
        )
    return check_same_run(config, directory / "config.yaml")


def check_same_run(config: Config, path: Path) -> tuple[Config, list[Change]]:
    """Refuse to resume a run with settings that would make it a different run, unless ``resume.allow`` names them.

    Args:
        config: configuration of the resuming process.
        path: the run's config.yaml; nothing is checked if it does not exist.

    Returns:
        as `continue_run`.

    Raises:
        UserError: if a setting differs; names its key, both values, and what to add to change it. Also if the run's
            config.yaml is damaged, or of a version with other keys.
    """
    saved = _saved_config(path)
    if saved is None:
        return with_lengths(config), []
    saved = with_lengths(saved)
    config = with_lengths(config, saved)
    start = config.checkpoint.start_from
    if start is not None and start != saved.checkpoint.start_from:
        raise UserError(
            f"{path.parent} holds a run, which continues from its own checkpoints and not from "
            f"checkpoint.start_from={start}: remove checkpoint.start_from, or choose another run_directory"
        )
    differences = [
        Change(key, old, new)
        for key, old, new in _differences(_compared(saved), _compared(config))
        if key not in ("run_directory", "checkpoint.start_from")
    ]
    if fixed := next((change for change in differences if names_key(FIXED, change.key)), None):
        raise UserError(
            f"{path.parent} holds a run with {fixed.key}={shown_value(fixed.old)}, this one has "
            f"{shown_value(fixed.new)}, which cannot change within a run: set it back, or choose another run_directory"
        )
    allow = config.resume.allow
    refused = [change for change in differences if _determines(change.key) and not names_key(allow, change.key)]
    if refused:
        key, old, new = refused[0].key, shown_value(refused[0].old), shown_value(refused[0].new)
        names = list(dict.fromkeys(_allowance(change.key, differences) for change in refused))
        others = f" ({', '.join(names[1:])} {'differs' if len(names) == 2 else 'differ'} as well)" if names[1:] else ""
        raise UserError(
            f"{path.parent} holds a run with {key}={old}, this one has {new}{others}: choose another run_directory, or "
            f"set {key} back, or add resume.allow=[{','.join([*allow, *names])}] to continue with the change"
        )
    config.checkpoint.start_from = saved.checkpoint.start_from
    return config, differences


def _saved_config(path: Path) -> Config | None:
    """Read the config.yaml of a run; None if there is none.

    Raises:
        UserError: if it is damaged, or of a version with other keys.
    """
    if not path.is_file():
        return None
    values: Any = OmegaConf.to_container(read_config_file(path))
    try:
        return read(Config, values)
    except UserError as error:
        raise UserError(f"cannot resume {path.parent}: {path.name}: {error}; choose another run_directory") from None


def with_lengths(config: Config, before: Config | None = None) -> Config:
    """Return the configuration with the steps that its schedules take, which stay when a run is given more steps.

    Args:
        config: the configuration.
        before: that of the previous start of the same run; None for a new run.
    """
    config = copy.deepcopy(config)
    schedule, optimizer, first = config.algorithm.schedule, config.optimizer, before or config
    if schedule.total_steps is None:
        schedule.total_steps = first.algorithm.schedule.total_steps or first.steps
    if optimizer.decay_steps is None:
        optimizer.decay_steps = first.optimizer.decay_steps or first.steps
    return config


def lengths_agreed(config: Config) -> Config:
    """Return the configuration with the lengths of schedules that rank 0 has, which alone has read the run directory.

    Collective over the job.
    """
    config = copy.deepcopy(config)
    schedule, optimizer = config.algorithm.schedule, config.optimizer
    schedule.total_steps, optimizer.decay_steps = waiting.broadcast_from_main(
        (schedule.total_steps, optimizer.decay_steps), "rank 0 to read the run directory"
    )
    return config


def check_allowance(config: Config) -> None:
    """Refuse a ``resume.allow`` with something that is not a key, or that cannot change.

    Raises:
        UserError: for the first such entry.
    """
    known = {*keys(Config), *(f"{section}.{name}" for section in _BY_NAME for name in _parameters(config, section))}
    for entry in config.resume.allow:
        if names_key(FIXED, entry):
            raise UserError(
                f"resume.allow: {entry} cannot change within a run, because its checkpoints hold such adapters: leave "
                "it out, and choose another run_directory for others"
            )
        in_mapping = any(type_of(key, Config).type is dict and entry.startswith(f"{key}.") for key in known)
        if not in_mapping and not any(names_key([entry], key) for key in known):
            raise UserError(
                f"resume.allow: unknown configuration key {shown(entry)}{did_you_mean(entry, known)}: write keys or "
                "sections, such as resume.allow=[optimizer.learning_rate]"
            )


def without_allowance(config: Config) -> Config:
    """Return the configuration as config.yaml keeps it: ``resume.allow`` applies to one start."""
    return replace(config, resume=ResumeConfig())


def record_changes(directory: Path, changes: Sequence[Change]) -> None:
    """Append changes to the run's ``config_history.jsonl``: the step from which they apply, key, old, new, time.

    Raises:
        OSError: if the file cannot be written.
    """
    if not changes:
        return
    step, now = newest_written(directory / "checkpoints"), time.strftime("%Y-%m-%dT%H:%M:%S%z")
    lines = [json.dumps({"step": step, **asdict(change), "time": now}) + "\n" for change in changes]
    with (directory / HISTORY_FILE).open("a", encoding="utf-8") as file:
        file.write("".join(lines))


def _parameters(config: Config, section: str) -> Iterable[str]:
    """The parameters of the schedule or of the objective that a configuration has chosen."""
    return asdict(getattr(config.algorithm, section.split(".")[1]))


def _compared(config: Config) -> dict[str, Any]:
    """The settings of a configuration that two starts of a run are compared by."""
    return {name: value for name, value in asdict(config).items() if name != "resume"}


def _determines(key: str) -> bool:
    """Whether a setting determines what the run trains."""
    return key.split(".")[0] in IDENTITY and not key.startswith(MAY_CHANGE)


def _allowance(key: str, differences: Sequence[Change]) -> str:
    """What resume.allow must name to change a key: the section, if it has another ``name`` now."""
    changed = {change.key for change in differences}
    return next((s for s in _BY_NAME if key.startswith(f"{s}.") and f"{s}.name" in changed), key)


def shown_value(value: Any) -> str:
    """A value of the configuration for an error, cut if it is long."""
    return truncated(str(value).replace("\n", " "), 200)


def _differences(old: Any, new: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield (dotted key, old value, new value) for every value that differs."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in {**old, **new}:
            yield from _differences(old.get(name), new.get(name), f"{key}.{name}" if key else name)
    elif old != new:
        yield key, old, new
