"""The reports of all nodes, gathered and compared: what is wrong everywhere, and what is wrong on some nodes only."""

from __future__ import annotations

import time
from collections.abc import Sequence

from megatron_rlvr.cluster.node_checks import BadNodesError, NodeReport
from megatron_rlvr.cluster.node_rendezvous import NodeRendezvous
from megatron_rlvr.errors import UserError


def gather_reports(rendezvous: NodeRendezvous) -> list[NodeReport]:
    """Return the report of every node, in the order of the nodes.

    Raises:
        BadNodesError: if some nodes send none within two thirds of the time that is left.
    """
    until = time.monotonic() + rendezvous.seconds_left() * 2 / 3
    nodes = rendezvous.nodes
    reports = [rendezvous.read("report", index, until - time.monotonic()) for index in range(len(nodes))]
    silent = [node for node, report in zip(nodes, reports, strict=True) if report is None]
    if silent:
        raise BadNodesError(silent, f"{', '.join(silent)}: no report, the node hangs or cannot reach {nodes[0]}")
    return [NodeReport(**report) for report in reports]


def compare_reports(reports: Sequence[NodeReport]) -> None:
    """Refuse a job if its nodes report problems or different versions.

    Raises:
        UserError: for a problem that all nodes have. The configuration or the environment is wrong, not a node.
        BadNodesError: for problems that only some nodes have.
    """
    problems = {report.node: list(report.problems) for report in reports}
    for problem in problems[reports[0].node]:
        if all(problem in of_node for of_node in problems.values()):
            raise UserError(problem if len(reports) == 1 else f"{problem} (on all {len(reports)} nodes)")
    for node, differences in differing_versions(reports).items():
        problems[node] += differences
    bad = {node: of_node for node, of_node in problems.items() if of_node}
    if bad:
        raise BadNodesError(list(bad), "; ".join(f"{node}: {', '.join(of_node)}" for node, of_node in bad.items()))


def differing_versions(reports: Sequence[NodeReport]) -> dict[str, list[str]]:
    """Return the nodes whose versions differ from those of most nodes, each with the differences."""
    differences: dict[str, list[str]] = {}
    for name in sorted({name for report in reports for name in report.versions}):
        values = [report.versions.get(name, "missing") for report in reports]
        common = max(dict.fromkeys(values), key=values.count)
        for report, value in zip(reports, values, strict=True):
            if value != common:
                differences.setdefault(report.node, []).append(f"{name} {value} instead of {common}")
    return differences
