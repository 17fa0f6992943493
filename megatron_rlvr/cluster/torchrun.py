"""torchrun of one node, as a batch system wants it: ``python -m megatron_rlvr.cluster.torchrun OPTIONS -- COMMAND``.

COMMAND is what Python is given, such as ``-m megatron_rlvr.train run.yaml``. The ranks are started by torchrun itself,
with c10d rendezvous at the first node. Beyond torchrun,

- SIGUSR1, SIGTERM and SIGINT are handed to the ranks, which finish their step and save; torchrun would kill them;
- the ranks' exit status becomes this program's (torchrun's is 1 whatever happened), and the reason is written beside
  the logs, where the batch script finds it;
- nodes that end together end well: the first keeps the rendezvous until all have written theirs, for a torchrun that
  misses it takes its node for failed, and srun kills what is left of a step of which one part ended with a status;
- no rank outlives this process, and this process no parent: not after a SIGKILL of either.
"""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from megatron_rlvr.atomic_write import write_text
from megatron_rlvr.bound_to_parent import bound_command, exit_with_parent
from megatron_rlvr.cluster.rank_log import log_path
from megatron_rlvr.lifecycle import EXIT_DONE, EXIT_STOPPED, EXIT_USER_ERROR
from megatron_rlvr.log_tail import last_error

_RANK_LOG = Path(__file__).with_name("rank_log.py")
_JOIN_TIMEOUT_S = 300
# How long a node whose ranks stopped, or failed, waits for the outcomes of the others.
_STOPPED_TOGETHER_S = 30
_FAILED_TOGETHER_S = 5
_STOP_SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Hands signals that ask for a stop to the ranks; before there are any, ends this process as stopped."""

    def __init__(self) -> None:
        import psutil  # here, because a dry run happens on a login node, with whatever Python that has

        self.received: int | None = None
        self._this = psutil.Process()
        for number in _STOP_SIGNALS:
            signal.signal(number, self._forward)

    def _forward(self, number: int, _frame: FrameType | None) -> None:
        self.received = number
        ranks = self._this.children()
        if not ranks:
            raise SystemExit(EXIT_STOPPED)
        for rank in ranks:
            # It may end meanwhile.
            if rank.is_running():
                rank.send_signal(number)


def rank_command(command: Sequence[str], logs: Path, parent: int | str) -> list[str]:
    """Return the command line of a rank: Python on `command`, bound to `parent`, with its output in its log."""
    with_log = [sys.executable, "-I", str(_RANK_LOG), str(logs), sys.executable, "-u", *command]
    return bound_command(with_log, parent)


def exit_status(codes: Sequence[int], asked: bool) -> int:
    """The status of a node from those of its ranks that did not return 0.

    Args:
        codes: exit codes; negative for a signal.
        asked: whether a stop was asked for, so that a rank which died of the signal itself, because it had not come
            to where it heeds signals, has stopped well.
    """
    stopped = {EXIT_STOPPED, *(-number for number in _STOP_SIGNALS if asked)}
    others = [code for code in codes if code not in stopped]
    if not others:
        return EXIT_STOPPED if codes else EXIT_DONE
    if EXIT_USER_ERROR in others:
        return EXIT_USER_ERROR
    return others[0] if others[0] > 0 else 128 - others[0]


def describe(codes: Mapping[int, int], logs: Path) -> str:
    """Which rank ended first, how, and the error that its log names; one line."""
    rank, code = min(codes.items(), key=lambda item: (item[1] == EXIT_STOPPED, item[0]))
    how = f"with status {code}" if code >= 0 else f"of {signal.Signals(-code).name}"
    return f"rank {rank} on {node_name()} ended {how}: {last_error(log_path(logs, rank))}"


def run(options: argparse.Namespace, command: Sequence[str], stop: StopRequest) -> tuple[int, str]:
    """Run this node's ranks to their end; the exit status, and the reason when it is not 0."""
    # Of what torchrun logs as a warning, the loss of the rendezvous when another node ends first is what is seen.
    quiet = "TORCH_CPP_LOG_LEVEL" not in os.environ
    if quiet:
        os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"
    logging.getLogger("torch.distributed.elastic.rendezvous").setLevel(logging.ERROR)
    # Imported here: it takes seconds, in which signals must be heeded already.
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args
    from torch.distributed.run import run as torchrun

    if quiet:  # torch has read it; the ranks may warn
        del os.environ["TORCH_CPP_LOG_LEVEL"]

    arguments = [f"--nnodes={options.nnodes}", f"--nproc-per-node={options.nproc_per_node}", "--max-restarts=0"]
    arguments += ["--rdzv-backend=c10d", f"--rdzv-id={options.rdzv_id}", f"--rdzv-endpoint={options.rdzv_endpoint}"]
    # torchrun numbers nodes in the order of their addresses; by default that is what the system calls this machine.
    arguments += [f"--local-addr={node_name()}"]
    arguments += [f"--rdzv-conf=join_timeout={_JOIN_TIMEOUT_S},is_host={int(hosts_rendezvous(options))}"]
    arguments += ["--signals-to-handle=SIGQUIT", "--no-python"]
    try:
        torchrun(parse_args([*arguments, *rank_command(command, options.logs, os.getpid())]))
    except ChildFailedError as error:
        codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
        return exit_status(list(codes.values()), stop.received is not None), describe(codes, options.logs)
    except SystemExit:
        return EXIT_STOPPED, "asked to stop before any rank had started"
    except Exception as error:
        first_line = str(error).strip().partition("\n")[0]
        return 1, f"torchrun on {node_name()} failed: {type(error).__name__}: {first_line}"
    return EXIT_DONE, ""


def hosts_rendezvous(options: argparse.Namespace) -> bool:
    """Whether this is the node at which the others meet."""
    return options.nnodes == 1 or options.rdzv_endpoint.rpartition(":")[0] == node_name()


@contextmanager
def rendezvous_kept(options: argparse.Namespace) -> Iterator[None]:
    """On the node that hosts it, the rendezvous is there until the end of this, and not of its own ranks."""
    if options.nnodes == 1 or not hosts_rendezvous(options):
        yield
        return
    from torch.distributed import TCPStore

    host, _, port = options.rdzv_endpoint.rpartition(":")
    store = None
    with suppress(RuntimeError):  # torchrun will meet it, too, and say it
        # Of several stores at one port of a process, torch makes one server.
        store = TCPStore(host, int(port), is_master=True, multi_tenant=True, wait_for_workers=False)
    yield
    del store


def await_outcomes(options: argparse.Namespace, status: int) -> None:
    """Wait for the outcomes of the other nodes, as long as they can be expected after this node's `status`."""
    together = status in (EXIT_DONE, EXIT_STOPPED)
    deadline = time.monotonic() + (_STOPPED_TOGETHER_S if together else _FAILED_TOGETHER_S)
    while len(list(options.logs.glob("outcome.*"))) < options.nnodes and time.monotonic() < deadline:
        time.sleep(0.05)


def print_commands(options: argparse.Namespace, command: Sequence[str]) -> None:
    """What every rank of the job will run, in full."""
    nodes = options.dry_run.split(",")
    size, local = len(nodes) * options.nproc_per_node, options.nproc_per_node
    words = shlex.join(rank_command(command, options.logs, "LAUNCHER_PID"))
    for rank in range(size):
        node = nodes[rank // local]
        variables = f"RANK={rank} LOCAL_RANK={rank % local} WORLD_SIZE={size} LOCAL_WORLD_SIZE={local}"
        print(f"rank {rank} on {node}: {variables} MASTER_ADDR={nodes[0]} {words}")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nnodes", type=int, required=True)
    parser.add_argument("--nproc-per-node", type=int, required=True)
    parser.add_argument("--rdzv-id", required=True)
    parser.add_argument("--rdzv-endpoint", required=True, help="HOST:PORT on the first node")
    parser.add_argument("--logs", type=Path, required=True, help="folder of the ranks' logs and this node's outcome")
    parser.add_argument("--dry-run", metavar="NODE,NODE...", help="print the command of every rank, start nothing")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="-- and what Python is given")
    options = parser.parse_args(arguments)
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    if options.dry_run:
        print_commands(options, command)
        return EXIT_DONE
    stop = StopRequest()
    exit_with_parent()
    options.logs.mkdir(parents=True, exist_ok=True)
    with rendezvous_kept(options):
        status, reason = run(options, command, stop)
        write_text(options.logs / f"outcome.{node_name()}", f"{status} {reason}\n")
        await_outcomes(options, status)
    return status


def node_name() -> str:
    """What Slurm calls this node."""
    return os.environ.get("SLURMD_NODENAME") or os.uname().nodename


if __name__ == "__main__":
    sys.exit(main())
