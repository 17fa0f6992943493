"""torchrun for one node of a Slurm job: ``python -m megatron_rlvr.cluster.torchrun OPTIONS -- COMMAND``.

COMMAND holds Python's arguments, such as ``-m megatron_rlvr.train run.yaml``. torchrun itself starts the ranks, with
the c10d rendezvous on the first node. This program adds what torchrun does not do:

- It passes SIGUSR1, SIGTERM and SIGINT on to the ranks, which finish their step and save. torchrun would kill them.
- It exits with the status of the rank that failed first, where torchrun always exits with 1, and writes the reason next
  to the logs, where the batch script finds it.
- It ends together with the other nodes. The first node keeps the rendezvous open until all nodes have written their
  outcomes. A torchrun that loses the rendezvous would report its node as failed, and srun kills the whole step if one
  of its tasks exits with a nonzero status.
- No rank outlives it, and it does not outlive its parent, even after SIGKILL.
"""

from __future__ import annotations

import argparse
import datetime
import logging
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import psutil

from megatron_rlvr.bound_to_parent import exit_with_parent
from megatron_rlvr.cluster.outcome import Outcome, await_outcomes
from megatron_rlvr.cluster.rank_exit import STOP_SIGNALS, RankExit, first_failure, log_path, read_exit
from megatron_rlvr.cluster.rank_supervisor import supervisor_command
from megatron_rlvr.errors import UserError
from megatron_rlvr.exit_status import EXIT_DONE, EXIT_STOPPED
from megatron_rlvr.log_tail import last_error
from megatron_rlvr.node import node_name
from megatron_rlvr.node_address import LOOPBACK, listening_store, node_address, resolves_to

_JOIN_TIMEOUT_S = 300


class StopRequest:
    """Passes stop signals on to the ranks. Before there are ranks, a stop signal ends this process as stopped."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._this = psutil.Process()
        for number in STOP_SIGNALS:
            signal.signal(number, self._forward)

    def _forward(self, number: int, _frame: FrameType | None) -> None:
        self.received = number
        ranks = self._this.children()
        if not ranks:
            raise SystemExit(EXIT_STOPPED)
        for rank in ranks:
            if rank.is_running():
                rank.send_signal(number)


def describe(rank: RankExit, logs: Path) -> str:
    """Return one line: which rank ended, how, and the last error in its log."""
    how = f"with status {rank.code}" if rank.code >= 0 else f"of {signal.Signals(-rank.code).name}"
    return f"rank {rank.rank} on {node_name()} ended {how}: {last_error(log_path(logs, rank.rank))}"


def outcome_of(exits: Sequence[RankExit], logs: Path, asked: bool) -> Outcome:
    """Return the outcome of a node.

    Args:
        exits: exits of the ranks that did not return 0.
        asked: whether the launcher received a stop signal.
    """
    first = first_failure(exits, asked)
    if first.stopped(asked):
        return Outcome(EXIT_STOPPED, describe(first, logs))
    return Outcome(first.status, describe(first, logs), first.time)


def run(options: argparse.Namespace, command: Sequence[str], stop: StopRequest) -> Outcome:
    """Run this node's ranks until all have ended."""
    # A node that ends after the one that hosts the rendezvous warns about the lost connection, which is expected here.
    quiet = "TORCH_CPP_LOG_LEVEL" not in os.environ
    if quiet:
        os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"
    logging.getLogger("torch.distributed.elastic.rendezvous").setLevel(logging.ERROR)
    # Imported here, because it takes seconds in which signals must already be handled.
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args
    from torch.distributed.run import run as torchrun

    if quiet:  # torch has read it; the ranks may log warnings
        del os.environ["TORCH_CPP_LOG_LEVEL"]

    arguments = [f"--nnodes={options.nnodes}", f"--nproc-per-node={options.nproc_per_node}", "--max-restarts=0"]
    name, endpoint = node_name(), options.rdzv_endpoint
    if hosts_rendezvous(options):  # on this node its own name may lead to an address at which the store does not listen
        address = rendezvous_address(options)
        endpoint = f"{address}:{endpoint.rpartition(':')[2]}"
        name = name if resolves_to(name, address) else address
    arguments += ["--rdzv-backend=c10d", f"--rdzv-id={options.rdzv_id}", f"--rdzv-endpoint={endpoint}"]
    # torchrun numbers nodes in the order of their addresses, by default the host names, which can differ from Slurm's.
    arguments += [f"--local-addr={name}"]
    arguments += [f"--rdzv-conf=join_timeout={_JOIN_TIMEOUT_S},is_host={int(hosts_rendezvous(options))}"]
    arguments += ["--signals-to-handle=SIGQUIT", "--no-python"]
    try:
        torchrun(parse_args([*arguments, *supervisor_command(command, options.logs, os.getpid())]))
    except ChildFailedError as error:
        exits = [
            read_exit(options.logs, rank, failure.exitcode, failure.timestamp)
            for rank, failure in error.failures.items()
        ]
        return outcome_of(exits, options.logs, stop.received is not None)
    except SystemExit:
        return Outcome(EXIT_STOPPED, "asked to stop before any rank had started")
    except Exception as error:
        first_line = str(error).strip().partition("\n")[0]
        return Outcome(1, f"torchrun on {node_name()} failed: {type(error).__name__}: {first_line}")
    return Outcome(EXIT_DONE)


def hosts_rendezvous(options: argparse.Namespace) -> bool:
    """Return whether this node hosts the rendezvous."""
    return options.nnodes == 1 or options.rdzv_endpoint.rpartition(":")[0] == node_name()


def rendezvous_address(options: argparse.Namespace) -> str:
    """Return the address at which the node that hosts the rendezvous listens."""
    return LOOPBACK if options.nnodes == 1 else node_address(node_name())


@contextmanager
def rendezvous_kept(options: argparse.Namespace) -> Iterator[None]:
    """Keep the rendezvous open until the end of the block, on the node that hosts it. torchrun closes it earlier.

    It listens only at the address that the nodes of the job use. torchrun's own would listen at all addresses.

    Raises:
        UserError: if the port is taken.
    """
    if not hosts_rendezvous(options):
        yield
        return
    port, address = int(options.rdzv_endpoint.rpartition(":")[2]), rendezvous_address(options)
    try:
        # Two stores of one process at the same port share a server, so torchrun uses this one.
        store = listening_store(address, port, datetime.timedelta(seconds=_JOIN_TIMEOUT_S), multi_tenant=True)
    except OSError as error:
        raise UserError(f"port {port} of {address} cannot be used for the rendezvous ({error.strerror})") from error
    yield
    del store


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nnodes", type=int, required=True)
    parser.add_argument("--nproc-per-node", type=int, required=True)
    parser.add_argument("--rdzv-id", required=True)
    parser.add_argument("--rdzv-endpoint", required=True, help="HOST:PORT on the first node")
    parser.add_argument("--logs", type=Path, required=True, help="folder of the ranks' logs and this node's outcome")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="-- and Python's arguments")
    options = parser.parse_args(arguments)
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    stop = StopRequest()
    exit_with_parent()
    options.logs.mkdir(parents=True, exist_ok=True)
    try:
        with rendezvous_kept(options):
            outcome = run(options, command, stop)
            outcome.write(options.logs)
            await_outcomes(options.logs, options.nnodes)
    except UserError as error:
        outcome = Outcome(1, str(error))  # another attempt uses another port
        outcome.write(options.logs)
    return outcome.status


if __name__ == "__main__":
    sys.exit(main())
