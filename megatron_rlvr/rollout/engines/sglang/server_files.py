"""Temporary files and shared memory of a server, removed when it has ended, however it ended.

SGLang leaves its sockets in the folder for temporary files, and semaphores and shared memory in /dev/shm, even if it
was asked to end. So a server gets a temporary folder of its own, and its shared memory is noted there while it runs. If
the process that started the server is killed before it can remove them, the next one on the machine does.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

_PREFIX = "rlvr-sglang-"
_SHARED_MEMORY = Path("/dev/shm")
_NOTE, LOCK = "shared_memory", "lock"


class ServerFiles:
    """The temporary folder of one server, locked as long as this process lives.

    Args:
        environment: environment variables of the server, whose TMPDIR is where the folder is created.

    Attributes:
        temporary: the folder for the server's temporary files.
    """

    def __init__(self, environment: Mapping[str, str]):
        parent = Path(environment.get("TMPDIR") or tempfile.gettempdir())
        remove_abandoned(parent)
        self._folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
        self._lock = (self._folder / LOCK).open("w")
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self.temporary = self._folder / "tmp"
        self.temporary.mkdir()

    def note_shared_memory(self, group: int) -> None:
        """Note which shared memory the processes of a group use."""
        names = sorted(_shared_memory_of(group))
        if names:
            known = _noted(self._folder)
            (self._folder / _NOTE).write_text("".join(f"{name}\n" for name in sorted({*known, *names})))

    def remove(self) -> None:
        """Remove the files of a server that has ended."""
        _remove(self._folder)
        self._lock.close()


def remove_abandoned(parent: Path, prefix: str = _PREFIX) -> None:
    """Remove the folders in `parent` of processes that were killed, whose lock is therefore free.

    Args:
        parent: folder of these folders, shared with other users.
        prefix: what their names begin with; by default, the files of servers. The lock is a file ``lock`` in each.
    """
    for folder in parent.glob(f"{prefix}*"):
        with suppress(OSError):
            if folder.stat().st_uid != os.getuid():
                continue
            with (folder / LOCK).open("r+") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove(folder)


def _remove(folder: Path) -> None:
    for name in _noted(folder):
        with suppress(OSError):
            (_SHARED_MEMORY / name).unlink()
    shutil.rmtree(folder, ignore_errors=True)


def _noted(folder: Path) -> list[str]:
    try:
        return [name for name in (folder / _NOTE).read_text().splitlines() if name and "/" not in name]
    except OSError:
        return []


def _shared_memory_of(group: int) -> Iterator[str]:
    """Yield the names in /dev/shm that processes of a group map, except memory that the trainer shares with them."""
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with suppress(OSError):
            if os.getpgid(int(entry.name)) != group:
                continue
            for line in (entry / "maps").read_text(errors="replace").splitlines():
                path = line.partition(f"{_SHARED_MEMORY}/")[2].removesuffix(" (deleted)")
                # torch's own manager removes what torch shares by name, and the trainer may still use it.
                if path and not path.startswith("torch_"):
                    yield path
