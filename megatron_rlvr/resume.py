"""What a resumed run may change: every setting but those that make it the run it is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from megatron_rlvr.config import Config
from megatron_rlvr.config_reader import read
from megatron_rlvr.errors import UserError

# The rest (more steps, another parallel layout, other telemetry) may change when a run is resumed.
IDENTITY = ("seed", "data", "verifier", "rollout", "algorithm", "optimizer")
MAY_CHANGE = ("rollout.record", "rollout.recording", "rollout.engine", "rollout.local_batch", "rollout.sglang")


def check_same_run(config: Config, path: Path) -> None:
    """Refuse to resume a run under settings that would make it another run.

    Args:
        config: the present one.
        path: the config.yaml that the run began with.

    Raises:
        UserError: naming the first setting that differs.
    """
    if not path.is_file():
        return
    begun: Any = OmegaConf.to_container(OmegaConf.load(path))
    for key, old, new in _differences(asdict(read(Config, begun)), asdict(config)):
        if key.split(".")[0] in IDENTITY and not key.startswith(MAY_CHANGE):
            raise UserError(
                f"{path.parent} holds a run with {key}={old}, this one has {new}: "
                "choose another run_directory, or set it back"
            )


def _differences(old: Any, new: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Every (dotted key, old value, new value) that differs."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in {**old, **new}:
            yield from _differences(old.get(name), new.get(name), f"{key}.{name}" if key else name)
    elif old != new:
        yield key, old, new
