"""Processes that end with the process that started them, even if that process is killed with SIGKILL.

`bind_to_parent` asks the kernel to kill the calling process with its parent. For a program that cannot call it,
`bound_command` runs this file in front of the program's own command::

    python bound_to_parent.py PARENT_PID COMMAND ARGUMENT ...

The file is executed by path and imports only the standard library, so it also works in front of a Python environment in
which this package is not installed. `exit_with_parent` is for a parent that starts processes from short-lived threads.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence

_PR_SET_PDEATHSIG = 1
_WATCH_PERIOD_S = 0.5


def bind_to_parent(parent: int) -> None:
    """Have the kernel kill this process with SIGKILL when its parent dies. The request survives exec.

    The kernel sends the signal when the *thread* that started this process ends, so a process must be started from a
    thread that lives as long as the process should. If the parent is already dead, this process exits with status 1.

    Args:
        parent: process id of the parent.
    """
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # the parent died before the request, so no signal will come
        os._exit(1)


def bound_command(command: Sequence[str], parent: int) -> list[str]:
    """Return a command line that binds itself to its parent and then becomes `command`; see `bind_to_parent`.

    Args:
        command: the program, as an absolute path, and its arguments.
        parent: process id of the process that will start it.
    """
    # -I ignores PYTHONPATH, which may belong to another Python, and this folder, whose modules would shadow others.
    return [sys.executable, "-I", __file__, str(parent), *command]


def exit_with_parent() -> None:
    """Start a thread that ends this process within a second of its parent's death.

    Use it instead of `bind_to_parent` if the parent is the daemon of a batch system. The daemon may start processes
    from a thread that ends early, and the kernel would treat the end of that thread as the death of the parent.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_WATCH_PERIOD_S)
        os._exit(128 + signal.SIGKILL)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


if __name__ == "__main__":
    bind_to_parent(int(sys.argv[1]))
    os.execv(sys.argv[2], sys.argv[2:])
