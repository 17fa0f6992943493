"""A folder that a conversion writes file by file, under the name ``NAME.partial`` until it is complete.

If the conversion is killed, the next one with the same input continues after the files that are complete.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_rlvr.atomic_write import write_text
from megatron_rlvr.checked_input import InvalidInputError, parse_object, read_bytes
from megatron_rlvr.errors import UserError
from megatron_rlvr.megatron.sharded_checkpoint import root_cause
from megatron_rlvr.weights.huggingface_folder import shard_names, write_index
from megatron_rlvr.weights.safetensors_writer import Described, is_complete, nbytes, plan_shards, write_shard

Report = Callable[[str], None]
"""Called with a line of text for every step of progress."""
_INPUT = "input.json"


def begin(target: Path, source: dict[str, Any], report: Report) -> Path:
    """Return the folder to write, for `completing`: a new one, or that of an interrupted conversion.

    Args:
        target: folder that the conversion makes.
        source: what determines the contents, as JSON; a folder that was begun with another source is removed.
        report: called with lines of progress.

    Raises:
        UserError: if the target exists or cannot be written.
    """
    if target.exists():
        raise UserError(f"{target} exists: remove it or name another output")
    partial = target.with_name(target.name + ".partial")
    try:
        if _began_with(source, partial / _INPUT):
            report(f"continuing with {partial}")
            return partial
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write_text(partial / _INPUT, json.dumps(source))
    except (OSError, ValueError) as error:
        raise cannot_write(target, error) from error
    return partial


def close_input(partial: Path) -> None:
    """Remove the record of the input before `completing` does: every file is complete."""
    (partial / _INPUT).unlink()


@contextmanager
def completing(partial: Path, target: Path) -> Iterator[None]:
    """Rename `partial` to `target` at the end of a block that writes its files.

    A UserError of the block removes the folder, because its input is wrong. Any other error leaves it, to be continued.

    Raises:
        UserError: if a file cannot be written.
    """
    try:
        yield
        (partial / _INPUT).unlink(missing_ok=True)
        partial.rename(target)
    except UserError:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    except OSError as error:
        raise cannot_write(target, error) from error


def write_missing_shards(
    partial: Path, described: Described, tensor: Callable[[str], Tensor], shard_bytes: int, report: Report
) -> None:
    """Write the safetensors files that are not complete yet, one tensor at a time, and their index.

    Args:
        partial: result of `begin`.
        described: dtype and shape of every tensor, in the order of the files.
        tensor: returns a tensor by its name.
        shard_bytes: largest size of a file, unless a single tensor is larger.
        report: called with lines of progress.
    """
    shards = plan_shards(described, shard_bytes)
    for number, (names, file) in enumerate(zip(shards, shard_names(len(shards)), strict=True)):
        in_shard = {name: described[name] for name in names}
        if not is_complete(partial / file, in_shard):
            write_shard(partial / file, in_shard, ((name, tensor(name)) for name in names))
        report(f"{number + 1} of {len(shards)} files")
    if len(shards) > 1:
        write_index(partial, shards, sum(map(nbytes, described.values())))


def identities(files: Iterable[Path]) -> dict[str, list[int]]:
    """Return size and modification time of files, which identify an input."""
    return {str(file): [file.stat().st_size, file.stat().st_mtime_ns] for file in sorted(files)}


def cannot_write(target: Path, error: BaseException) -> UserError:
    """Return the error for a target that cannot be written."""
    return UserError(f"{target} cannot be written: {root_cause(error)}; free some space and start again to continue")


def _began_with(source: dict[str, Any], path: Path) -> bool:
    """Whether an interrupted conversion recorded this source; a damaged record is none."""
    try:
        return parse_object(read_bytes(path)) == source
    except (OSError, InvalidInputError):
        return False
