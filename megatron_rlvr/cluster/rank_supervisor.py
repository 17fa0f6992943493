"""The parent process of one rank: ``python -m megatron_rlvr.cluster.rank_supervisor PARENT_PID LOGS COMMAND ...``.

It starts ``python COMMAND`` with its output in ``LOGS/rank_N.log``, passes signals on to it, and records how it ended
(`rank_exit`). Rank 0's output is also copied to this process's own, so that the output of a job shows the run. Neither
process outlives the one that started it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from megatron_rlvr.bound_to_parent import bind_to_parent
from megatron_rlvr.cluster.rank_exit import STOP_SIGNALS, failure_path, log_path, write_exit
from megatron_rlvr.exit_status import FAILURE_FILE_VARIABLE

# A process that the rank started can keep the output open after the rank has ended. Its later output is not awaited.
_LOG_TIMEOUT_S = 10


def rank_command(command: Sequence[str]) -> list[str]:
    """Return the command line of the rank itself."""
    return [sys.executable, "-u", *command]


def supervisor_command(command: Sequence[str], logs: Path, parent: int) -> list[str]:
    """Return the command line of a rank's supervisor."""
    return [sys.executable, "-m", __spec__.name, str(parent), str(logs), *command]


def run_rank(logs: Path, command: Sequence[str]) -> int:
    """Run the rank and return its exit status."""
    rank = int(os.environ["RANK"])
    # Signals are blocked before the child exists, so that none is lost. `sigwait` takes them from the queue.
    handled = {signal.SIGCHLD, *STOP_SIGNALS}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, handled)
    supervisor = os.getpid()

    def prepare_child() -> None:
        bind_to_parent(supervisor)
        # A signal to the process group also reached this child if it had not left the group yet. Ignoring a signal
        # discards one that is pending; the supervisor records it and passes it on.
        for number in STOP_SIGNALS:
            signal.signal(number, signal.signal(number, signal.SIG_IGN))
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    log, copy = log_path(logs, rank), None
    if rank == 0:
        # `tee` ends when the last process that writes to it ends. Stop signals stay blocked in it, because Slurm sends
        # them to every process of a step, and the rank still writes while it saves.
        copy = subprocess.Popen(["tee", "-a", log], stdin=subprocess.PIPE, start_new_session=True)
    with copy.stdin if copy is not None and copy.stdin is not None else log.open("ab") as output:
        child = subprocess.Popen(
            rank_command(command),
            env=os.environ | {FAILURE_FILE_VARIABLE: str(failure_path(logs, rank))},
            stdout=output,
            stderr=output,
            # torchrun signals the process group. The rank must receive SIGTERM from this process, once it is recorded.
            start_new_session=True,
            preexec_fn=prepare_child,
        )
    terminated = None
    while child.poll() is None:
        number = signal.sigwait(handled)
        if number == signal.SIGCHLD or child.poll() is not None:
            continue
        if number == signal.SIGTERM and terminated is None:
            terminated = time.time()
            # Recorded now, because torchrun kills this process if the rank does not end.
            write_exit(logs, rank, None, None, terminated)
        child.send_signal(number)
    write_exit(logs, rank, child.returncode, time.time(), terminated)
    if copy is not None:
        with suppress(subprocess.TimeoutExpired):
            copy.wait(_LOG_TIMEOUT_S)
    return child.returncode if child.returncode >= 0 else 128 - child.returncode


if __name__ == "__main__":
    bind_to_parent(int(sys.argv[1]))
    sys.exit(run_rank(Path(sys.argv[2]), sys.argv[3:]))
