"""The run directory and its lock, and the signals that stop a run."""

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
from megatron_rlvr.resume import (
    HISTORY_FILE,
    check_allowance,
    continue_run,
    record_changes,
    with_lengths,
    without_allowance,
)
from megatron_rlvr.run_inputs import record_inputs


@contextmanager
def open_run_directory(config: Config) -> Iterator[Config]:
    """Lock the run directory while the block runs, and write its ``config.yaml``; rank 0 does both.

    Yields:
        the configuration, on rank 0 with the lengths of the run's schedules (`resume.lengths_agreed` for the others).

    Raises:
        UserError: if another process uses the directory, it holds a different run, or it cannot be written.
    """
    check_allowance(config)
    directory = Path(config.run_directory)
    with user_error_on_full_disk(directory):
        if _rank() > 0:
            yield config
            return
        with locked_run_directory(directory):
            # Not only `latest`: the checkpoint is chosen without it.
            checkpoints = directory / "checkpoints"
            resumes = any(checkpoints.glob("step_*")) or os.path.lexists(checkpoints / "latest")
            config, changes = continue_run(config, directory) if resumes else (with_lengths(config), [])
            changes += record_inputs(config, resumes)
            for line in warnings_of(config):
                print(f"warning: {line}", file=sys.stderr)
            if not resumes:
                (directory / HISTORY_FILE).unlink(missing_ok=True)  # of a run whose checkpoints were removed
            record_changes(directory, changes)
            save_config(without_allowance(config), directory / "config.yaml")
            yield config


@contextmanager
def locked_run_directory(directory: Path) -> Iterator[Path]:
    """Create a run directory if needed, and hold its lock while the block runs.

    The kernel releases the lock when the process ends, however it ends. This calls flock(2) directly instead of using
    the package filelock, for two reasons (tested with filelock 4.3.1). filelock does not record which process holds a
    flock, so the error could not name it. On a file system without flock (Lustre without its mount option) filelock
    raises, or falls back to the existence of the file: then the file of a killed run blocks a resume on another node.
    This function warns there and continues.

    Raises:
        UserError: if another process holds the lock, or the directory cannot be written.
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
    """Convert the OSError of a full disk or an exhausted quota to a UserError, so that the run ends with one line.

    It wraps the whole run, because a checkpoint in the background can fill the disk during any other write.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"{directory} cannot be written ({error.strerror}): its complete checkpoints are intact; free some "
            "space and start again"
        ) from error


class StopSignal:
    """Records SIGTERM, SIGINT or SIGUSR1, so that the current step can finish before the run stops.

    A second SIGINT interrupts at once.

    Attributes:
        received: name of the first signal; None until one arrives.
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
    """Print an error as one line on stderr, with the rank unless it is 0."""
    rank = _rank()
    print(f"error: {error}" if rank == 0 else f"error (rank {rank}): {error}", file=sys.stderr)


def _rank() -> int:
    """Return the rank that torchrun assigned to this process; 0 without torchrun."""
    return int(os.environ.get("RANK", "0"))
