"""How a run begins and ends: its directory and lock, the signals that stop it."""

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

from megatron_rlvr.config import Config, save_config, warnings_of
from megatron_rlvr.errors import UserError
from megatron_rlvr.resume import check_same_run


@contextmanager
def open_run_directory(config: Config) -> Iterator[None]:
    """Hold the run directory while the block runs; rank 0 locks it and writes ``config.yaml``.

    Raises:
        UserError: when another process uses the directory, it holds a different run, or it cannot be written.
    """
    directory = Path(config.run_directory)
    with user_error_on_full_disk(directory):
        if _rank() > 0:
            yield
            return
        for line in warnings_of(config):
            print(f"warning: {line}", file=sys.stderr)
        with locked_run_directory(directory):
            if (directory / "checkpoints" / "latest").is_file():
                check_same_run(config, directory / "config.yaml")
            save_config(config, directory / "config.yaml")
            yield


@contextmanager
def locked_run_directory(directory: Path) -> Iterator[Path]:
    """Hold the lock of a run directory, which is created if it does not exist.

    The kernel releases the lock when the process ends, however it ends. This is flock(2) itself rather than the package
    filelock, for two reasons that were tried with filelock 4.3.1: filelock cannot name the process that holds the lock,
    and on a file system without flock (Lustre without its mount option) it falls back to the existence of the file, so
    that the file of a killed run blocks its own resume.

    Raises:
        UserError: when another process holds the lock, or the directory cannot be written.
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
            print(
                f"warning: the file system of run_directory={directory} has no locks ({error.strerror}): make sure "
                "that no other run writes there",
                file=sys.stderr,
            )
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield directory


@contextmanager
def user_error_on_full_disk(directory: Path) -> Iterator[None]:
    """Raise the OSError of a full disk or an exhausted quota as a UserError, so that the run ends with one line.

    A checkpoint that is written in the background can fill the disk while something else is written.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"{directory} cannot be written ({error.strerror}): its complete checkpoints are untouched; free some "
            "space and start again"
        ) from error


class StopSignal:
    """Remembers that SIGTERM, SIGINT or SIGUSR1 asked the run to stop, so that the current step can finish.

    A second SIGINT interrupts at once.

    Attributes:
        received: name of the signal, None so far.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._remember)

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received is not None:
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name


def print_error(error: Exception) -> None:
    """Print an error as one line on stderr; ranks other than 0 name themselves."""
    rank = _rank()
    print(f"error: {error}" if rank == 0 else f"error (rank {rank}): {error}", file=sys.stderr)


def _rank() -> int:
    """The rank that torchrun gave this process; 0 without torchrun."""
    return int(os.environ.get("RANK", "0"))
