"""The network between the nodes of a job: an all-reduce over all of them, and a search for the node that breaks it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from megatron_rlvr.cluster.node_checks import BadNodesError
from megatron_rlvr.cluster.node_rendezvous import NodeRendezvous
from megatron_rlvr.errors import UserError


def check_network(rendezvous: NodeRendezvous, nodes: int, processes: int, gpu: bool) -> str:
    """Run an all-reduce over all training processes. Every training node must call this.

    If it fails, the nodes repeat it in small groups, to find the node that breaks it.

    Args:
        nodes: number of training nodes, the first ones.
        processes: training processes per node.
        gpu: whether to use NCCL on GPUs; otherwise gloo on the CPU.

    Returns:
        the measured time and bandwidth in one line on the head, an empty string on other nodes.

    Raises:
        BadNodesError: on the head, with the nodes whose all-reduces fail in every group.
        UserError: on the head, if no group of nodes succeeds.
    """
    from megatron_rlvr.cluster.all_reduce import bus_bandwidth

    is_head = rendezvous.index == 0
    results = all_reduce_in_groups(rendezvous, "all", [range(nodes)], processes, gpu)
    failed = {node: result for node, result in results.items() if isinstance(result, str)}
    if is_head:
        rendezvous.publish("search", bool(failed))
    if not rendezvous.read("search", 0, rendezvous.seconds_left()):
        if not is_head:
            return ""
        slowest = max(results.values(), key=lambda result: result["seconds"])
        bandwidth = bus_bandwidth(slowest["bytes"], nodes * processes, slowest["seconds"])
        return (
            f"all-reduce over {nodes} x {processes} processes: {slowest['bytes'] / 2**20:.0f} MiB in "
            f"{slowest['seconds'] * 1e3:.2f} ms, bus bandwidth {bandwidth / 1e9:.2f} GB/s"
        )
    failures = dict.fromkeys(range(nodes), 0)
    for number, groups in enumerate(search_rounds(nodes)):
        for node, result in all_reduce_in_groups(rendezvous, f"round{number}", groups, processes, gpu).items():
            failures[node] += isinstance(result, str)
    if not is_head:
        return ""
    reason = f"the all-reduce over {nodes} nodes fails ({'; '.join(sorted(set(failed.values())))})"
    suspects = [node for node, count in failures.items() if count >= min(2, nodes - 1)]
    if nodes > 1 and len(suspects) == nodes:
        where = "between any two of them" if nodes > 2 else "on each of them alone"
        raise UserError(
            f"{reason}, also {where}, so no single node is at fault. Check the network settings in "
            "examples/slurm/common.sh (NCCL_SOCKET_IFNAME, NCCL_IB_HCA), with NCCL_DEBUG=INFO"
        )
    # If all groups succeed and only the whole job fails, exclude the last node: the head has at least answered.
    bad = [rendezvous.nodes[node] for node in suspects] or [rendezvous.nodes[nodes - 1]]
    raise BadNodesError(bad, f"{reason}; leaving out {', '.join(bad)}")


def all_reduce_in_groups(
    rendezvous: NodeRendezvous, name: str, groups: Sequence[Sequence[int]], processes: int, gpu: bool
) -> dict[int, Any]:
    """Run an all-reduce within every group of nodes at the same time. Every training node must call this.

    Returns:
        the result of every node (see `timed_all_reduce`) on the head; nothing on other nodes.
    """
    from megatron_rlvr.cluster.all_reduce import timed_all_reduce

    # A third of the time, because the rounds that search for a bad node must also fit before the deadline.
    seconds = rendezvous.seconds_left() / 3
    own_group = next((list(group) for group in groups if rendezvous.index in group), None)
    if own_group is not None:
        result = timed_all_reduce(rendezvous.endpoint, name, own_group, rendezvous.index, processes, gpu, seconds)
        rendezvous.publish(name, result)
    if rendezvous.index:
        return {}
    until = time.monotonic() + seconds / 2
    members = [node for group in groups for node in group]
    return {node: rendezvous.read(name, node, until - time.monotonic()) or "it sent no result" for node in members}


def search_rounds(nodes: int) -> list[list[list[int]]]:
    """Return rounds of groups, such that only the groups of a bad node fail.

    One or two nodes are tried alone. More form a ring, in which each is paired with both of its neighbours. No node is
    in two pairs of a round, so there are two rounds, or three if the number of nodes is odd.
    """
    if nodes < 3:
        return [[[node] for node in range(nodes)]]
    ring = [[node, (node + 1) % nodes] for node in range(nodes)]
    even = nodes - nodes % 2
    return [ring[0:even:2], ring[1:even:2], *([ring[even:]] if nodes % 2 else [])]
