"""The check before training, one process a node: ``python -m megatron_rlvr.cluster.preflight OPTIONS -- CONFIG ...``.

Every node looks at itself (`node_checks`); the first one, the head, gathers the reports with a deadline, compares them,
plans the configuration, has all training processes do an all-reduce, and says the verdict: ``verdict`` in the report
folder holds an exit status and a line, ``bad_nodes`` the nodes to leave out. Statuses: 0 go, 2 for a user
error (wrong on every node, or in the configuration), 69 when nodes are bad.
"""

from __future__ import annotations

import argparse
import fcntl
import functools
import os
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_rlvr.cluster.children import ChildError, start
from megatron_rlvr.cluster.job_plan import plan
from megatron_rlvr.cluster.meeting import BadNodesError, Meeting
from megatron_rlvr.cluster.node_checks import NodeReport, check_node, differing_versions
from megatron_rlvr.config import Config, load_config
from megatron_rlvr.errors import UserError
from megatron_rlvr.exit_status import EXIT_DONE, EXIT_USER_ERROR

EXIT_BAD_NODE = 69
# A network file system may hold the lock of a node that is gone for its lease of 90 seconds.
_LOCK_WAIT_S = 150
_SEE_WAIT_S = 20


def gather_reports(meeting: Meeting) -> list[NodeReport]:
    """Every node's report.

    Raises:
        BadNodesError: for nodes that sent none in two thirds of the time.
    """
    until = time.monotonic() + meeting.left() * 2 / 3
    found = [meeting.hear("report", i, until - time.monotonic()) for i in range(len(meeting.nodes))]
    missing = [node for node, report in zip(meeting.nodes, found, strict=True) if report is None]
    if missing:
        raise BadNodesError(
            missing, f"{', '.join(missing)}: no report, the node hangs or cannot reach {meeting.nodes[0]}"
        )
    return [NodeReport(**report) for report in found]


def see_reports(nodes: Sequence[str], folder: Path, seconds: float) -> None:
    """See to it that what every node has written into the run directory is there for this one, the head.

    Raises:
        UserError: when nothing of any other node is: the run directory is not shared.
        BadNodesError: when something of some nodes is not.
    """
    until = time.monotonic() + seconds
    while unseen := [node for node in nodes if not (folder / f"{node}.json").is_file()]:
        if time.monotonic() > until:
            break
        time.sleep(0.1)
    else:
        return
    reason = f"what {', '.join(unseen)} wrote into {folder} is not there on {nodes[0]}"
    if unseen == list(nodes[1:]):
        raise UserError(f"{reason}: choose a run_directory on a file system that the nodes share")
    raise BadNodesError(unseen, reason)


def judge(reports: Sequence[NodeReport]) -> None:
    """Weigh the reports: what is wrong everywhere is the configuration's or the environment's, else a node is bad.

    Raises:
        UserError: for a problem that all nodes have.
        BadNodesError: for problems that some have.
    """
    problems = {report.node: list(report.problems) for report in reports}
    for shared in problems[reports[0].node]:
        if all(shared in found for found in problems.values()):
            raise UserError(shared if len(reports) == 1 else f"{shared} (on all {len(reports)} nodes)")
    for node, differences in differing_versions(list(reports)).items():
        problems[node] += differences
    bad = {node: found for node, found in problems.items() if found}
    if bad:
        raise BadNodesError(list(bad), "; ".join(f"{node}: {', '.join(found)}" for node, found in bad.items()))


def all_reduce(
    meeting: Meeting, name: str, groups: Sequence[Sequence[int]], processes: int, gpu: bool
) -> dict[int, Any]:
    """Have the nodes of every group do an all-reduce among themselves; each node's result. Called by every node.

    The head's return is complete; the others' holds their own. A node without a result hung or died.
    """
    from megatron_rlvr.cluster.collectives import timed_all_reduce

    # Rounds after the first, which find the bad node, must fit into the time too.
    seconds = meeting.left() / 3
    own = next((list(group) for group in groups if meeting.index in group), None)
    if own is not None:
        result = timed_all_reduce(meeting.endpoint, name, own, meeting.index, processes, gpu, seconds)
        meeting.say(name, result)
    if meeting.index:
        return {}
    until = time.monotonic() + seconds / 2
    members = [i for group in groups for i in group]
    return {i: meeting.hear(name, i, until - time.monotonic()) or "it sent no result" for i in members}


def search_rounds(nodes: int) -> list[list[list[int]]]:
    """Rounds of all-reduces that find a bad node: each node by itself where there are two, else with either neighbour.

    The neighbours of a ring, in which no node is in two pairs of a round: two rounds, or three where the number is odd.
    """
    if nodes < 3:
        return [[[i] for i in range(nodes)]]
    ring = [[i, (i + 1) % nodes] for i in range(nodes)]
    even = nodes - nodes % 2
    return [ring[0:even:2], ring[1:even:2], *([ring[even:]] if nodes % 2 else [])]


def measure_network(meeting: Meeting, nodes: int, processes: int, gpu: bool) -> str:
    """The all-reduce over all training processes, and its figure; called by every node, the head's return counts.

    Raises:
        BadNodesError: on the head, naming those whose all-reduces with either neighbour fail.
        UserError: on the head, when none succeeds between any nodes.
    """
    from megatron_rlvr.cluster.collectives import bus_bandwidth

    everything = all_reduce(meeting, "all", [range(nodes)], processes, gpu)
    failed = {i: result for i, result in everything.items() if isinstance(result, str)}
    if meeting.index == 0:
        meeting.say("search", bool(failed))
    if not meeting.hear("search", 0, meeting.left()):
        if meeting.index:
            return ""
        slowest = max(everything.values(), key=lambda result: result["seconds"])
        rate = bus_bandwidth(slowest["bytes"], nodes * processes, slowest["seconds"])
        return (
            f"all-reduce over {nodes} x {processes} processes: {slowest['bytes'] / 2**20:.0f} MiB in "
            f"{slowest['seconds'] * 1e3:.2f} ms, bus bandwidth {rate / 1e9:.2f} GB/s"
        )
    rounds = search_rounds(nodes)
    failures = dict.fromkeys(range(nodes), 0)
    for number, groups in enumerate(rounds):
        for i, result in all_reduce(meeting, f"round{number}", groups, processes, gpu).items():
            failures[i] += isinstance(result, str)
    if meeting.index:
        return ""
    reason = f"the all-reduce over {nodes} nodes fails ({'; '.join(sorted(set(failed.values())))})"
    suspects = [i for i, count in failures.items() if count >= min(2, nodes - 1)]
    if nodes > 1 and len(suspects) == nodes:
        what = "between any two of them" if nodes > 2 else "on each of them alone"
        raise UserError(
            f"{reason}, also {what}: that is no node's fault. Look at the network's settings in "
            "examples/slurm/common.sh (NCCL_SOCKET_IFNAME, NCCL_IB_HCA), with NCCL_DEBUG=INFO"
        )
    # Where it fails in whole only: keep the head, which has at least said so.
    guilty = [meeting.nodes[i] for i in suspects] or [meeting.nodes[nodes - 1]]
    raise BadNodesError(guilty, f"{reason}; leaving out {', '.join(guilty)}")


def wait_for_lock(run_directory: Path, seconds: float) -> None:
    """Wait until no process of an earlier attempt holds the run directory.

    Raises:
        UserError: when one still does after so long.
    """
    if not (run_directory / ".lock").is_file():
        return
    until = time.monotonic() + seconds
    with (run_directory / ".lock").open("r+") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > until:
                    raise UserError(
                        f"run_directory={run_directory} is in use by process {lock.read().strip() or 'unknown'}: "
                        "wait for that run, stop it, or choose another run_directory"
                    ) from None
                time.sleep(0.2)
            except OSError:  # a file system without locks, which the trainer will tell of
                return


def lead(meeting: Meeting, config: Config, options: argparse.Namespace) -> None:
    """The head's part.

    Raises:
        UserError, BadNodesError: the verdict, when it is not to go.
    """
    nodes, processes = options.train_nodes, options.processes_per_node
    try:
        reports = gather_reports(meeting)
        see_reports(meeting.nodes, options.report, min(_SEE_WAIT_S, meeting.left() / 3))
        judge(reports)
        gpus = {name for report in reports for name, _ in report.gpus}
        print(
            f"preflight: {len(reports)} nodes agree on {', '.join(f'{k} {v}' for k, v in reports[0].versions.items())}"
        )
        print(
            f"preflight: GPUs: {', '.join(sorted(gpus)) or 'none'}; model, data and run directory are there", flush=True
        )
        wait_for_lock(Path(config.run_directory), min(_LOCK_WAIT_S, meeting.left() / 2))
        # In a process of its own: it binds a GPU, after which no fork of this one could use NCCL.
        planning = start(functools.partial(plan, config, reports, nodes, processes, options.servers))
        try:
            for line in planning.result(meeting.deadline).splitlines():
                print(f"preflight: {line}", flush=True)
        except ChildError as error:
            raise UserError(f"the configuration cannot be planned: {error}") from error
    except (UserError, BadNodesError):
        meeting.say("go", "end")
        raise
    gpu = bool(gpus)
    meeting.say("go", "gpu" if gpu else "cpu")
    print(f"preflight: {measure_network(meeting, nodes, processes, gpu)}", flush=True)


def follow(meeting: Meeting, options: argparse.Namespace) -> None:
    """The other nodes' part."""
    go = meeting.hear("go", 0, meeting.left())
    if go in ("gpu", "cpu") and meeting.index < options.train_nodes:
        measure_network(meeting, options.train_nodes, options.processes_per_node, go == "gpu")
    meeting.say("end", True)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; the head returns the verdict's status, the other nodes 0."""
    began = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", required=True, help="names of all nodes, the head first, comma-separated")
    parser.add_argument("--endpoint", required=True, help="HOST:PORT on the head")
    parser.add_argument("--train-nodes", type=int, required=True, help="how many of the nodes train: the first ones")
    parser.add_argument("--processes-per-node", type=int, required=True)
    parser.add_argument("--servers", default="none", help="SGLang servers of the job: none, colocated or nodes:N")
    parser.add_argument("--report", type=Path, required=True, help="folder for the reports and the verdict")
    parser.add_argument("--seconds", type=float, default=300.0, help="deadline of everything")
    parser.add_argument("training", nargs=argparse.REMAINDER, help="-- CONFIG key=value ..., as for training")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    nodes = options.nodes.split(",")
    node = os.environ.get("SLURMD_NODENAME", nodes[0])
    index = nodes.index(node)
    host, port = options.endpoint.rsplit(":", 1)
    training = [word for word in options.training if word != "--"]

    def verdict(status: int, reason: str, bad: Sequence[str] = ()) -> int:
        if index:
            return EXIT_DONE
        options.report.mkdir(parents=True, exist_ok=True)
        (options.report / "bad_nodes").write_text("".join(f"{name}\n" for name in bad))
        (options.report / "verdict").write_text(f"{status} {reason}\n")
        print(f"preflight: {reason} ({time.monotonic() - began:.1f} s)", flush=True)
        return status

    try:
        config = load_config(training[0], training[1:])
        report = check_node(node, config, options.processes_per_node, index < options.train_nodes, options.report)
        meeting = Meeting(nodes, index, (host, int(port)), options.seconds - (time.monotonic() - began))
        meeting.say("report", asdict(report))
        if index:
            follow(meeting, options)
            return EXIT_DONE
        lead(meeting, config, options)
        for other in range(1, len(nodes)):  # the store ends with this process
            meeting.hear("end", other, min(5.0, meeting.left()))
    except UserError as error:
        return verdict(EXIT_USER_ERROR, str(error))
    except BadNodesError as error:
        return verdict(EXIT_BAD_NODE, str(error), error.nodes)
    return verdict(EXIT_DONE, "all nodes are fit")


if __name__ == "__main__":
    sys.exit(main())
