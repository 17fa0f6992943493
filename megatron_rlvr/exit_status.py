"""Exit statuses of the programs, and the record that a failing process leaves for its launcher.

This module imports little: the launcher prints its commands on login nodes, where no other package is installed.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_rlvr.atomic_write import write_text
from megatron_rlvr.errors import UserError

if TYPE_CHECKING:
    from typing import NoReturn, ParamSpec  # Python 3.10, and a login node may have an older one

    P = ParamSpec("P")

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_USER_ERROR = UserError.exit_status
EXIT_STOPPED = 75
"""Stopped by a signal or because the rollout engine was lost, with a checkpoint: the same command resumes the run."""

FAILURE_FILE_VARIABLE = "RLVR_FAILURE_FILE"
"""Environment variable that names the file in which a rank records its failure."""


@contextmanager
def failure_recorded() -> Iterator[None]:
    """Record an exception in the file that the launcher names in `FAILURE_FILE_VARIABLE`: when, and the exit status.

    The launcher reports the rank that failed first. The order in which ranks exit does not show which one that was: the
    rank that raised may take seconds to stop its servers, while ranks that lose their connection to it exit at once.
    Nor does its exit status, because torchrun ends it with SIGTERM when one of the others has exited.
    Wrap the innermost block, so that the exception is recorded before anything is closed.
    """
    try:
        yield
    except BaseException as error:
        if path := os.environ.get(FAILURE_FILE_VARIABLE):
            record = {"time": time.time(), "status": getattr(error, "exit_status", 1)}
            with suppress(OSError):
                write_text(Path(path), json.dumps(record), flush_to_disk=False)
        raise


def status_is_returned(main: Callable[P, int]) -> Callable[P, int]:
    """Decorate the `main` of a program, so that nothing but its return value can become exit status 0.

    Code that a run calls may end the process as if it were done: a user's verifier, or a signal handler that a library
    installed. A launcher would then take a run that stopped in the middle for complete. SystemExit from within `main`
    becomes status 1 with a traceback, and so does ``os._exit(0)`` by this process, also after `main` has failed.
    argparse, which exits after ``--help``, is exempt.
    """

    @functools.wraps(main)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> int:
        exit_now, owner, returned = os._exit, os.getpid(), EXIT_FAILED

        def guarded_exit(status: int) -> NoReturn:
            if status == EXIT_DONE and returned != EXIT_DONE and os.getpid() == owner:
                traceback.print_stack()
                print("error: something called os._exit(0) before the program was done", file=sys.stderr, flush=True)
                status = EXIT_FAILED
            exit_now(status)

        os._exit = guarded_exit
        try:
            returned = main(*args, **kwargs)
        except SystemExit as error:
            if _raised_by_argparse(error):
                os._exit = exit_now
                raise
            traceback.print_exc()
            print(f"error: something raised SystemExit({error.code!r}) before the program was done", file=sys.stderr)
        if returned == EXIT_DONE:
            os._exit = exit_now
        return returned

    return wrapper


def _raised_by_argparse(error: SystemExit) -> bool:
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and frames[-1].filename == argparse.__file__


def user_errors_reported(main: Callable[P, int]) -> Callable[P, int]:
    """Decorate the `main` of a program, so that a UserError becomes one line on stderr and exit status 2.

    It includes `status_is_returned`.
    """

    @functools.wraps(main)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> int:
        try:
            return main(*args, **kwargs)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return EXIT_USER_ERROR

    return status_is_returned(wrapper)
