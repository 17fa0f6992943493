"""Redirect a rank's output to its log, then become the rank: ``rank_log.py LOGS COMMAND ...``, executed as a file.

The output goes to ``LOGS/rank_N.log``. Rank 0's output also goes to where it went before, so that the output of the job
shows the run.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path


def log_path(logs: Path, rank: int) -> Path:
    """Return the path of a rank's log."""
    return logs / f"rank_{rank}.log"


def _ignore_stop_signals() -> None:
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def main(logs: Path, command: list[str]) -> None:
    rank = int(os.environ["RANK"])
    log = log_path(logs, rank)
    if rank == 0:
        # tee ends when the last process that writes to it ends. It ignores stop signals: Slurm sends one to every
        # process of a step, and the rank still writes while it saves.
        copy = subprocess.Popen(
            ["tee", "-a", log], stdin=subprocess.PIPE, start_new_session=True, preexec_fn=_ignore_stop_signals
        )
        assert copy.stdin is not None
        target = copy.stdin.fileno()
    else:
        target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(target, 1)
    os.dup2(target, 2)
    os.execv(command[0], command)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
