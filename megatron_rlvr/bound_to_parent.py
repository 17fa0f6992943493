"""Processes that do not outlive the process that started them, not even after a SIGKILL of it.

`bound_command` binds a child through the kernel, by running this file in front of the child's own command::

    python bound_to_parent.py PARENT_PID COMMAND ARGUMENT ...

The file is executed by path and imports only the standard library, so it works in front of any program, such as a
Python environment in which this package is not installed. `exit_with_parent` binds the calling process itself to a
parent that gives the kernel's mechanism no stable thread to hold on to.
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


def bound_command(command: Sequence[str], parent: int | str) -> list[str]:
    """Return a command line that runs `command` and is killed with SIGKILL when its parent dies.

    The kernel sends the signal when the *thread* that started the child ends, so start the child from a thread that
    lives as long as the child should.

    Args:
        command: the program, as an absolute path, and its arguments.
        parent: process id of the process that will start it.
    """
    # -I: neither PYTHONPATH, which may belong to another Python, nor this folder's modules shadow what is imported.
    return [sys.executable, "-I", __file__, str(parent), *command]


def exit_with_parent() -> None:
    """Start a thread that ends this process within a second of its parent's death.

    For a parent that is the daemon of a batch system: it may start processes from a thread that ends early, which the
    kernel would take for the death of the parent.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_WATCH_PERIOD_S)
        os._exit(128 + signal.SIGKILL)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


def _main(parent: int, command: list[str]) -> None:
    # The request survives exec. It is lost for a parent that died before it, hence the check that follows.
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(1)
    os.execv(command[0], command)


if __name__ == "__main__":
    _main(int(sys.argv[1]), sys.argv[2:])
