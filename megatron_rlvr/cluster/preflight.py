"""The check before training, one process per node: ``python -m megatron_rlvr.cluster.preflight OPTIONS -- CONFIG ...``.

Every node checks itself. The first node, the head, gathers the reports until a deadline, compares them, plans the
configuration, and has all training processes do an all-reduce. It leaves the result in the report folder: ``verdict``
holds an exit status and a line, ``bad_nodes`` the nodes to exclude. The status is 0 if the job can start, 2 for a user
error (in the configuration, or the same on every node), 69 if nodes are bad, and 1 if another attempt may succeed.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from megatron_rlvr.cluster.forked_process import ForkedProcessError, fork
from megatron_rlvr.cluster.network_check import check_network
from megatron_rlvr.cluster.node_checks import BadNodesError, check_node
from megatron_rlvr.cluster.node_comparison import compare_reports, gather_reports
from megatron_rlvr.cluster.node_rendezvous import NodeRendezvous, PortTakenError
from megatron_rlvr.cluster.plan_check import check_plan
from megatron_rlvr.cluster.run_directory_checks import check_shared, wait_for_lock
from megatron_rlvr.config import Config, load_config
from megatron_rlvr.errors import UserError
from megatron_rlvr.exit_status import EXIT_DONE, EXIT_USER_ERROR

EXIT_BAD_NODE = 69
EXIT_RETRY = 1
# A network file system may keep the lock of a node that is gone until its lease of 90 seconds ends.
_LOCK_TIMEOUT_S = 150
_SHARED_FILE_TIMEOUT_S = 20
_OTHER_NODES_TIMEOUT_S = 20.0


def lead(rendezvous: NodeRendezvous, config: Config, options: argparse.Namespace) -> None:
    """Check the job as its head. Raises UserError or BadNodesError if the job must not start."""
    nodes, processes = options.train_nodes, options.processes_per_node
    try:
        reports = gather_reports(rendezvous)
        check_shared(rendezvous.nodes, options.report, min(_SHARED_FILE_TIMEOUT_S, rendezvous.seconds_left() / 3))
        compare_reports(reports)
        gpus = {name for report in reports for name, _ in report.gpus}
        versions = ", ".join(f"{name} {version}" for name, version in reports[0].versions.items())
        print(f"preflight: {len(reports)} nodes agree on {versions}")
        print(
            f"preflight: GPUs: {', '.join(sorted(gpus)) or 'none'}; model, data and run directory are readable",
            flush=True,
        )
        wait_for_lock(Path(config.run_directory), min(_LOCK_TIMEOUT_S, rendezvous.seconds_left() / 2))
        # In a process of its own, because planning uses a GPU, after which no fork of this process could use NCCL.
        planning = fork(functools.partial(check_plan, config, reports, nodes, processes, options.servers))
        try:
            for line in planning.result(rendezvous.deadline).splitlines():
                print(f"preflight: {line}", flush=True)
        except ForkedProcessError as error:
            raise UserError(f"the configuration cannot be planned: {error}") from error
    except (UserError, BadNodesError):
        rendezvous.publish("network check", "none")
        raise
    rendezvous.publish("network check", "gpu" if gpus else "cpu")
    print(f"preflight: {check_network(rendezvous, nodes, processes, bool(gpus))}", flush=True)


def follow(rendezvous: NodeRendezvous, options: argparse.Namespace) -> None:
    """Take part in the network check, on a node that is not the head."""
    network_check = rendezvous.read("network check", 0, rendezvous.seconds_left())
    if network_check in ("gpu", "cpu") and rendezvous.index < options.train_nodes:
        check_network(rendezvous, options.train_nodes, options.processes_per_node, network_check == "gpu")
    rendezvous.publish("end", True)


def wait_for_other_nodes(rendezvous: NodeRendezvous) -> None:
    """Keep the store open, which ends with the head, until the other nodes no longer need it."""
    until = time.monotonic() + _OTHER_NODES_TIMEOUT_S
    for index in range(1, len(rendezvous.nodes)):
        rendezvous.read("end", index, until - time.monotonic())


def write_verdict(folder: Path, status: int, reason: str, bad_nodes: Sequence[str]) -> None:
    """Write the result of the preflight to where the batch script reads it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "bad_nodes").write_text("".join(f"{name}\n" for name in bad_nodes))
    (folder / "verdict").write_text(f"{status} {reason}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: the verdict's on the head, 0 on other nodes."""
    began = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", required=True, help="names of all nodes, the head first, comma-separated")
    parser.add_argument("--endpoint", required=True, help="HOST:PORT on the head")
    parser.add_argument("--train-nodes", type=int, required=True, help="how many of the nodes train: the first ones")
    parser.add_argument("--processes-per-node", type=int, required=True)
    parser.add_argument("--servers", default="none", help="SGLang servers of the job: none, colocated or nodes:N")
    parser.add_argument("--report", type=Path, required=True, help="folder for the reports and the verdict")
    parser.add_argument("--seconds", type=float, default=300.0, help="deadline of the whole preflight")
    parser.add_argument("training", nargs=argparse.REMAINDER, help="-- CONFIG key=value ..., as for training")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    nodes = options.nodes.split(",")
    node = os.environ.get("SLURMD_NODENAME", nodes[0])
    index = nodes.index(node)
    host, port = options.endpoint.rsplit(":", 1)
    training = [word for word in options.training if word != "--"]
    status, reason, bad_nodes = EXIT_DONE, "all nodes passed", []
    rendezvous = None
    try:
        config = load_config(training[0], training[1:])
        report = check_node(node, config, options.processes_per_node, index < options.train_nodes, options.report)
        seconds = options.seconds - (time.monotonic() - began)
        rendezvous = NodeRendezvous(nodes, index, (host, int(port)), seconds)
        rendezvous.publish("report", asdict(report))
        if index:
            follow(rendezvous, options)
            return EXIT_DONE
        lead(rendezvous, config, options)
    except UserError as error:
        status, reason = EXIT_USER_ERROR, str(error)
    except PortTakenError as error:
        status, reason = EXIT_RETRY, str(error)
    except BadNodesError as error:
        status, reason, bad_nodes = EXIT_BAD_NODE, str(error), error.nodes
    if index:  # the head reports what is wrong
        return EXIT_DONE
    write_verdict(options.report, status, reason, bad_nodes)
    print(f"preflight: {reason} ({time.monotonic() - began:.1f} s)", flush=True)
    if rendezvous is not None:
        wait_for_other_nodes(rendezvous)
    return status


if __name__ == "__main__":
    sys.exit(main())
