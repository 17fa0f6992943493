"""SHA-256 of every file of a folder, in a file ``SHA256SUMS`` that ``sha256sum --check`` reads, too.

The list is written last. It names every other file of the folder, so a file that is missing, added, cut, exchanged or
changed in one bit is found, and so is a damaged list: each of its bytes belongs to a name or a checksum, or separates
them. Checksums find damage. They are no signature: whoever can write the folder can write the list.

Of the checksums in Python's standard library, SHA-256 is the fastest that a standard program can check, because
processors have instructions for it. Files are hashed while they are written, or in several threads when they are read,
because hashing does not hold Python's global lock.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from megatron_rlvr.atomic_write import write_text
from megatron_rlvr.errors import first_line

LIST = "SHA256SUMS"
"""Name of the list in a folder."""
_LINE = re.compile(r"([0-9a-f]{64})  ([^\\\x00-\x1f\x7f]+)")
_LIST_BYTES = 2**26
_BLOCK_BYTES = 2**22
_THREADS = 4


class DamagedError(Exception):
    """A file is not what was written; the text says which file and what is wrong with it."""


class HashingFile(io.RawIOBase):
    """A file opened for writing that hashes what is written to it. It cannot seek.

    Args:
        file: the file, at its beginning.

    Attributes:
        size: bytes written.
    """

    def __init__(self, file: BinaryIO):
        super().__init__()
        self.size = 0
        self._file, self._hash = file, hashlib.sha256()

    def write(self, data: Any) -> int:
        """Write bytes or any object with a buffer; returns their number."""
        self._file.write(data)
        self._hash.update(data)
        self.size += (written := memoryview(data).nbytes)
        return written

    def digest(self) -> str:
        """Return the checksum of what has been written."""
        return self._hash.hexdigest()

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.size

    def flush(self) -> None:
        if not self.closed:
            self._file.flush()

    def fileno(self) -> int:
        self._file.flush()  # for fsync, which knows nothing of Python's buffer
        return self._file.fileno()


@contextmanager
def hashing_file(path: Path) -> Iterator[HashingFile]:
    """Open a file for writing that is hashed on the way. Raises OSError if its size is not what was written."""
    with path.open("wb") as file:
        hashing = HashingFile(file)
        yield hashing
    if (size := path.stat().st_size) != hashing.size:
        raise OSError(f"{path.name} has {size} bytes after {hashing.size} were written")


def digest(path: Path) -> str:
    """Return the checksum of a regular file, as 64 hexadecimal digits. Raises OSError if it cannot be read."""
    if not path.is_file():  # a device or a pipe could be read without end
        raise FileNotFoundError("not a regular file" if path.exists() else "missing")
    with path.open("rb", buffering=0) as file:
        found = hashlib.sha256()
        buffer = memoryview(bytearray(_BLOCK_BYTES))
        while count := file.readinto(buffer):
            found.update(buffer[:count])
    return found.hexdigest()


def write_list(folder: Path, known: Mapping[str, str]) -> None:
    """Write the list of a folder whose other files are complete.

    Args:
        folder: the folder.
        known: checksums by file name, of files that were hashed when they were written. Others are read.

    Raises:
        OSError: if a file cannot be read, or a file of `known` is missing.
    """
    names = file_names(folder)
    if missing := sorted(known.keys() - set(names)):
        raise FileNotFoundError(f"{missing[0]} is missing after it was written")
    lines = [f"{known.get(name) or digest(folder / name)}  {name}\n" for name in names]
    write_text(folder / LIST, "".join(lines))


def read_list(folder: Path) -> dict[str, str] | None:
    """Read the list of a folder: checksums by file name; None if the folder has no list.

    Raises:
        DamagedError: if the list cannot be read, or does not name exactly the other files of the folder.
    """
    path = folder / LIST
    if not os.path.lexists(path):
        return None
    try:
        if not path.is_file() or path.stat().st_size > _LIST_BYTES:
            raise DamagedError(f"{LIST} is damaged")
        text = path.read_bytes().decode()
        names = file_names(folder)
    except (OSError, ValueError) as error:
        raise DamagedError(f"{LIST} cannot be read ({_reason(error)})") from error
    lines = text.split("\n")
    matches = [_LINE.fullmatch(line) for line in lines[:-1]]
    if lines[-1] or not all(matches):
        raise DamagedError(f"{LIST} is damaged")
    listed = {match[2]: match[1] for match in matches if match}
    if len(listed) != len(matches):
        raise DamagedError(f"{LIST} names a file twice")
    if missing := sorted(listed.keys() - set(names)):
        raise DamagedError(f"{missing[0]} is missing")
    if added := sorted(set(names) - listed.keys()):
        raise DamagedError(f"{added[0]} is not in {LIST}")
    return listed


def check_files(folder: Path, listed: Mapping[str, str], names: Iterable[str] | None = None) -> None:
    """Compare files with their checksums, in several threads.

    Args:
        folder: the folder.
        listed: checksums by file name, from `read_list`.
        names: the files to compare; None means all.

    Raises:
        DamagedError: for the first file that differs or cannot be read.
    """

    def check(name: str) -> str | None:
        try:
            return None if digest(folder / name) == listed[name] else f"{name} differs from its checksum"
        except OSError as error:
            return f"{name} cannot be read ({_reason(error)})"

    with ThreadPoolExecutor(_THREADS) as threads:
        for problem in threads.map(check, listed if names is None else names):
            if problem:
                threads.shutdown(wait=False, cancel_futures=True)
                raise DamagedError(problem)


def file_names(folder: Path) -> list[str]:
    """Return every file under a folder except the list, sorted, as paths relative to the folder."""
    paths = (Path(parent, name) for parent, _, names in os.walk(folder) for name in names)
    return sorted(name for path in paths if (name := path.relative_to(folder).as_posix()) != LIST)


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or first_line(error)
