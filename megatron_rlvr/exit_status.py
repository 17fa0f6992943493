"""Exit statuses of the programs, and the record that a failing process leaves for its launcher.

This module imports little: the launcher prints its commands on login nodes, where no other package is installed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from megatron_rlvr.atomic_write import write_text

EXIT_DONE = 0
EXIT_USER_ERROR = 2
EXIT_STOPPED = 75
"""Stopped by a signal, or for lack of an engine, with a checkpoint written: the same command resumes the run."""

FAILURE_FILE_VARIABLE = "RLVR_FAILURE_FILE"
"""Environment variable: the file in which a rank records when it failed."""


@contextmanager
def failure_recorded() -> Iterator[None]:
    """Record the time of an exception in the file that the launcher names in `FAILURE_FILE_VARIABLE`.

    The launcher reports the rank that failed first. The order in which ranks exit does not show it: one that raises may
    take seconds to stop its servers, while the ranks that lose their connection to it exit at once. Use it around the
    innermost block, so that the record is made before anything is closed.
    """
    try:
        yield
    except BaseException:
        if path := os.environ.get(FAILURE_FILE_VARIABLE):
            with suppress(OSError):
                write_text(Path(path), f"{time.time()}\n", flush_to_disk=False)
        raise
