"""Which settings a resumed run may change."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from megatron_rlvr.config import Config, read_config_file
from megatron_rlvr.config_reader import read
from megatron_rlvr.errors import UserError

# Sections that must stay the same. The others, such as steps, parallel and telemetry, may change.
IDENTITY = ("seed", "data", "verifier", "rollout", "algorithm", "optimizer")
# Keys of these sections that may change: how completions are generated and stored, but not how they are sampled.
MAY_CHANGE = ("rollout.record", "rollout.recording", "rollout.engine", "rollout.local_batch", "rollout.sglang")


def check_same_run(config: Config, path: Path) -> None:
    """Refuse to resume a run with settings that would make it a different run.

    Args:
        config: configuration of the resuming process.
        path: the run's config.yaml; nothing is checked if it does not exist.

    Raises:
        UserError: for the first setting that differs; names its key and both values. Also if the run's config.yaml
            is damaged, or of a version with other keys.
    """
    if not path.is_file():
        return
    values: Any = OmegaConf.to_container(read_config_file(path))
    try:
        saved = read(Config, values)
    except UserError as error:
        raise UserError(f"cannot resume {path.parent}: {path.name}: {error}; choose another run_directory") from None
    for key, old, new in _differences(asdict(saved), asdict(config)):
        if key.split(".")[0] in IDENTITY and not key.startswith(MAY_CHANGE):
            raise UserError(
                f"{path.parent} holds a run with {key}={old}, this one has {new}: "
                f"choose another run_directory, or set {key} back"
            )


def _differences(old: Any, new: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield (dotted key, old value, new value) for every value that differs."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in {**old, **new}:
            yield from _differences(old.get(name), new.get(name), f"{key}.{name}" if key else name)
    elif old != new:
        yield key, old, new
