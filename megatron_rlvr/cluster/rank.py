"""The first moments of a rank: ``rank.py PARENT LOGS COMMAND...``, executed as a file, becomes COMMAND.

The kernel kills it when PARENT dies, and its output goes to ``LOGS/rank_N.log``; rank 0's also to where it went before,
so that the job's own output shows the run.
"""

import ctypes
import os
import signal
import subprocess
import sys
from pathlib import Path

PR_SET_PDEATHSIG = 1


def log_path(logs: Path, rank: int) -> Path:
    """The log of a rank."""
    return logs / f"rank_{rank}.log"


def _ignore_stop_signals() -> None:
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def main(parent: int, logs: Path, command: list[str]) -> None:
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # survives the exec
    if os.getppid() != parent:  # it died before the request
        sys.exit(1)
    rank = int(os.environ["RANK"])
    log = log_path(logs, rank)
    if rank == 0:
        # It ends when the last that writes to it ends. A stop signal for the rank is none for its log, and Slurm sends
        # one to every process of a step.
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
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
