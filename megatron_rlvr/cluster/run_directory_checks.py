"""Whether all nodes of a job share its run directory, and whether another process still uses it."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Sequence
from pathlib import Path

from megatron_rlvr.cluster.node_checks import BadNodesError
from megatron_rlvr.errors import UserError


def check_shared(nodes: Sequence[str], folder: Path, seconds: float) -> None:
    """Check that this node, the first of `nodes`, sees the report that every node has written into `folder`.

    Args:
        seconds: how long a file may take to appear.

    Raises:
        UserError: if no file of any other node is there, so the run directory is not shared.
        BadNodesError: if the files of some nodes are missing.
    """
    until = time.monotonic() + seconds
    while missing := [node for node in nodes if not (folder / f"{node}.json").is_file()]:
        if time.monotonic() > until:
            break
        time.sleep(0.1)
    else:
        return
    reason = f"{nodes[0]} does not see what {', '.join(missing)} wrote to {folder}"
    if missing == list(nodes[1:]):
        raise UserError(f"{reason}: choose a run_directory on a file system that the nodes share")
    raise BadNodesError(missing, reason)


def wait_for_lock(run_directory: Path, seconds: float) -> None:
    """Wait until no process of an earlier attempt holds the lock of the run directory.

    Raises:
        UserError: if one still does after `seconds`.
    """
    if not (run_directory / ".lock").is_file():
        return
    until = time.monotonic() + seconds
    with (run_directory / ".lock").open("r+") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > until:
                    raise UserError(
                        f"run_directory={run_directory} is in use by process {lock.read().strip() or 'unknown'}: "
                        "wait for that run, stop it, or choose another run_directory"
                    ) from None
                time.sleep(0.2)
            except OSError:  # a file system without locks, about which the trainer warns
                return
