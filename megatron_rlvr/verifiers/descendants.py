"""The processes that a verifier has started, found and killed wherever they have moved.

A process group is not enough: a child may leave it with setsid, and become the child of init when its parent exits. So
a worker is the reaper of its orphaned descendants, which keeps them below it in the process tree. When the worker has
died before them, they are found by an environment variable that only this worker has.
"""

import contextlib
import ctypes
import os
import signal
import time
from pathlib import Path

MARK_VARIABLE = "RLVR_VERIFIER_WORKER"
"""Environment variable that has another value in every worker; its descendants inherit it."""

_PR_SET_CHILD_SUBREAPER = 36
_TIMEOUT_S = 10.0


def become_subreaper() -> None:
    """Make this process the parent of its descendants whose parents exit (Linux 3.4)."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)


def kill_descendants(ancestor: int, mark: str | None = None, including_ancestor: bool = False) -> None:
    """Kill all descendants of a process, and all processes of its session or with its mark.

    Args:
        ancestor: process id of a worker, which may have died, but has not been waited for.
        mark: value of `MARK_VARIABLE` of the worker; None to look at the process tree and the session alone.
        including_ancestor: whether to kill the worker itself.
    """
    if including_ancestor:
        # Stopped, it starts no further processes while its descendants are looked for.
        with contextlib.suppress(ProcessLookupError):
            os.kill(ancestor, signal.SIGSTOP)
    deadline = time.monotonic() + _TIMEOUT_S
    # Each pass may find processes that were started during the one before.
    while (found := _descendants(ancestor, mark)) and time.monotonic() < deadline:
        for process in found:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.001)
    if including_ancestor:
        with contextlib.suppress(ProcessLookupError):
            os.kill(ancestor, signal.SIGKILL)


def _descendants(ancestor: int, mark: str | None) -> list[int]:
    """Return the ids of living processes that belong to a worker, without the worker's own."""
    parents, marked = {}, set()
    for folder in Path("/proc").glob("[0-9]*"):
        process = int(folder.name)
        try:
            state, parent, _, session = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
            if state in "ZX":
                continue
            parents[process] = int(parent)
            environment = b"" if mark is None else (folder / "environ").read_bytes()
            if int(session) == ancestor or f"{MARK_VARIABLE}={mark}".encode() in environment:
                marked.add(process)
        except (OSError, ValueError):
            continue  # it has exited, or belongs to another user
    found = marked | {process for process in parents if _is_below(process, ancestor, parents)}
    return sorted(found - {ancestor, os.getpid()})


def _is_below(process: int, ancestor: int, parents: dict[int, int]) -> bool:
    for _ in range(len(parents)):  # process ids may have been reused while they were read, so a cycle is possible
        process = parents.get(process, 0)
        if process in (0, 1, ancestor):
            break
    return process == ancestor
