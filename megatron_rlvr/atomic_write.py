"""Files and folders that get their name only when they are complete.

A process can be killed at any byte. Everything that another process, or the next start of a run, may read is therefore
written under a temporary name and renamed. The temporary name of ``NAME`` is ``.NAME.partial`` in the same folder, so
neither a shell pattern nor a glob for ``NAME*`` finds it. One process at a time may write a given name.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def atomic_file(path: Path, *, flush_to_disk: bool = True) -> Iterator[BinaryIO]:
    """Open a temporary file for writing; rename it to `path` at the end of the block.

    If the block raises, the temporary file is removed and `path` does not change.

    Args:
        path: file to write; replaced if it exists.
        flush_to_disk: call fsync before the rename. Without it, a crash of the machine can leave an empty file under
            the final name; a killed process cannot. Pass False only for files that are rewritten all the time.

    Raises:
        OSError: if the file cannot be written, for example to a full or read-only disk.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            if flush_to_disk:
                os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_bytes(path: Path, data: bytes, *, flush_to_disk: bool = True) -> None:
    """Write `data` to the file `path`; see `atomic_file`."""
    with atomic_file(path, flush_to_disk=flush_to_disk) as file:
        file.write(data)


def write_text(path: Path, text: str, *, flush_to_disk: bool = True) -> None:
    """Write `text` to the file `path` as UTF-8; see `atomic_file`."""
    write_bytes(path, text.encode(), flush_to_disk=flush_to_disk)


def replace_folder(partial: Path, folder: Path) -> None:
    """Rename the complete folder `partial` to `folder`, which is replaced if it exists.

    A rename cannot replace a folder that has files in it. The old folder is moved aside first and deleted last, so a
    process that is killed in between loses neither.

    Raises:
        OSError: if a folder cannot be renamed.
    """
    previous = folder.with_name(folder.name + ".replaced")
    shutil.rmtree(previous, ignore_errors=True)
    if folder.exists():
        folder.rename(previous)
    partial.rename(folder)
    shutil.rmtree(previous, ignore_errors=True)
