"""How a run begins and ends: its directory, the signals that stop it, its exit status."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from megatron_rlvr.errors import UserError

EXIT_DONE = 0
EXIT_USER_ERROR = 2
EXIT_STOPPED = 75
"""Stopped by a signal with a checkpoint written: start the same command again to go on."""


@contextmanager
def locked_run_directory(directory: Path) -> Iterator[Path]:
    """Hold the run directory for this process; the lock goes when the process does, however it ends.

    Raises:
        UserError: when another living process trains in it, or it cannot be written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = (directory / ".lock").open("a+")
    except OSError as error:
        raise UserError(f"run_directory={directory} cannot be written: {error.strerror}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise UserError(
                f"run_directory={directory} is in use by process {lock.read().strip() or 'unknown'}: wait for it, stop "
                "it, or choose another run_directory"
            ) from None
        except OSError as error:
            # Such as Lustre without its option flock; it says nothing about other runs.
            print(
                f"warning: the file system of run_directory={directory} has no locks ({error.strerror}): see to it "
                "that no other run writes there",
                file=sys.stderr,
            )
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield directory


@contextmanager
def user_error_on_full_disk(directory: Path) -> Iterator[None]:
    """A disk that fills under a run ends it in one line: a checkpoint written in the background may be what fills it.

    Raises:
        UserError: instead of the OSError of a full disk or an exhausted quota.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"{directory} cannot be written ({error.strerror}): its whole checkpoints are untouched; make room and "
            "start again"
        ) from error


class StopSignal:
    """Remembers that SIGTERM, SIGINT or SIGUSR1 asked the run to stop, so that the step in progress can end well.

    A second SIGINT interrupts at once.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._remember)

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received is not None:
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name
