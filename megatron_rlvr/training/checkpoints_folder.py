"""The folder ``checkpoints/`` of a run on disk: names, leftovers of interrupted saves, and which checkpoints are kept.

One process calls these functions. ``step_N`` is a checkpoint after N steps, and ``latest`` names the newest one, for
people and scripts. The folder is named ``step_N.partial`` until every file is complete, ``step_N.damaged`` if a run
found it damaged and continued from an earlier one, and ``step_N.replaced`` or ``step_N.expired`` while it is deleted.
"""

from __future__ import annotations

import math
import os
import re
import shutil
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from megatron_rlvr.atomic_write import write_text
from megatron_rlvr.checksums import DamagedError
from megatron_rlvr.training.config import CheckpointConfig
from megatron_rlvr.weights.checkpoint_folder import read_record

_NAME = re.compile(r"step_(0|[1-9][0-9]{0,15})")
_LEFTOVERS = (".partial", ".replaced", ".expired")
_SET_ASIDE = ".damaged"


def steps(folder: Path) -> list[int]:
    """Return the steps of the checkpoints in a folder, intact or damaged, oldest first."""
    if not folder.is_dir():
        return []
    matches = (_NAME.fullmatch(entry.name) for entry in folder.iterdir())
    return sorted(int(match[1]) for match in matches if match)


def newest_written(folder: Path) -> int:
    """Return the step of the newest checkpoint whose record can be read; 0 if there is none."""
    for step in reversed(steps(folder)):
        with suppress(DamagedError):
            if read_record(folder / f"step_{step}")["step"] == step:
                return step
    return 0


def faults(folder: Path) -> dict[str, str]:
    """Return what is wrong with other entries of the folder, by their name. Leftovers are not wrong."""
    if not folder.is_dir():
        return {"": "it is not a folder"} if os.path.lexists(folder) else {}
    found = {}
    for entry in sorted(folder.glob("step_*")):
        if entry.name.endswith(_SET_ASIDE):
            found[entry.name] = f"{entry.name} was set aside"
        elif not entry.name.endswith(_LEFTOVERS) and not _NAME.fullmatch(entry.name):
            found[entry.name] = f"{entry.name} is not the name of a checkpoint, step_N"
    latest = folder / "latest"
    if os.path.lexists(latest):
        name = ""
        if latest.is_file():  # a pipe would be read without end
            with suppress(OSError, ValueError), latest.open("rb") as file:
                name = file.read(100).decode().strip()
        if not _NAME.fullmatch(name):
            found["latest"] = "latest does not name a checkpoint"
        elif not (folder / name).exists():
            found["latest"] = f"latest names {name}, which is missing"
    return found


def remove_leftovers(folder: Path) -> None:
    """Delete what a save left that was killed or filled the disk."""
    for end in _LEFTOVERS:
        for leftover in folder.glob(f"step_*{end}"):
            shutil.rmtree(leftover, ignore_errors=True)


def place(partial: Path, step: int, damaged: Collection[int], config: CheckpointConfig, expire: bool = True) -> None:
    """Give a complete checkpoint its name, and delete those that are no longer kept.

    Args:
        partial: folder of the checkpoint, in the folder of all checkpoints.
        step: its step.
        damaged: steps of checkpoints that are known to be damaged. They do not count as kept; later ones are set aside,
            earlier ones deleted.
        config: which checkpoints to keep.
        expire: whether to delete those that are no longer kept.

    Raises:
        OSError: if a folder cannot be renamed or deleted.
    """
    folder = partial.parent
    target = folder / f"step_{step}"
    if os.path.lexists(target):  # a damaged one
        _delete(target, ".replaced")
    partial.rename(target)
    write_text(folder / "latest", target.name)
    for other in damaged:
        path = folder / f"step_{other}"
        if other > step:
            shutil.rmtree(folder / f"{path.name}{_SET_ASIDE}", ignore_errors=True)
            path.rename(folder / f"{path.name}{_SET_ASIDE}")
        elif other < step:
            _delete(path, ".expired")
    for aside in folder.glob(f"step_*{_SET_ASIDE}"):
        name = _NAME.fullmatch(aside.name.removesuffix(_SET_ASIDE))
        if name and int(name[1]) <= step:
            shutil.rmtree(aside)
    if not expire:
        return
    records = {}
    for other in steps(folder):
        with suppress(DamagedError):  # it is found when it is loaded
            if other <= step:
                records[other] = read_record(folder / f"step_{other}")
    for other in expired(records, config):
        _delete(folder / f"step_{other}", ".expired")


def _delete(folder: Path, end: str) -> None:
    """Delete a folder under another name, so that a kill in between leaves no damaged checkpoint."""
    leftover = folder.with_name(folder.name + end)
    shutil.rmtree(leftover, ignore_errors=True)
    folder.rename(leftover)
    if leftover.is_symlink() or not leftover.is_dir():
        leftover.unlink()
    else:
        shutil.rmtree(leftover)


def expired(records: Mapping[int, Mapping[str, Any]], config: CheckpointConfig) -> list[int]:
    """Return the steps of the checkpoints to delete: neither among the newest, nor kept by time or score.

    Args:
        records: ``run.json`` of every checkpoint by step, oldest first.
        config: which checkpoints to keep.
    """
    steps = list(records)
    kept = set(steps[-config.keep :])
    if config.keep_hours:
        last_kept_at = -math.inf
        for step in steps:
            if (saved_at := records[step].get("saved_at", 0.0)) - last_kept_at >= 3600 * config.keep_hours:
                kept.add(step)
                last_kept_at = saved_at
    if config.keep_best and (scored := [step for step in steps if "score" in records[step]]):
        kept.add(max(scored, key=lambda step: (records[step]["score"], step)))
    return [step for step in steps if step not in kept]
