"""Reports of nodes: problems of all nodes, and problems of some."""

from __future__ import annotations

import pytest

from megatron_rlvr.cluster.node_checks import BadNodesError, NodeReport
from megatron_rlvr.cluster.node_comparison import compare_reports, differing_versions
from megatron_rlvr.errors import UserError


def test_a_problem_of_every_node_is_a_user_error() -> None:
    good = NodeReport("n1", {"torch": "2.13.0"})
    compare_reports([good, NodeReport("n2", {"torch": "2.13.0"})])
    everywhere = [NodeReport(f"n{i}", {"torch": "2.13.0"}, problems=["no data"]) for i in (1, 2)]
    with pytest.raises(UserError, match=r"no data \(on all 2 nodes\)"):
        compare_reports(everywhere)
    with pytest.raises(BadNodesError, match="n2: no data") as caught:
        compare_reports([good, everywhere[1]])
    assert caught.value.nodes == ["n2"]


def test_a_node_with_another_version_is_named() -> None:
    reports = [NodeReport(f"n{i}", {"torch": "2.13.0", "driver": "580"}) for i in range(3)]
    reports[1].versions["driver"] = "570"
    assert differing_versions(reports) == {"n1": ["driver 570 instead of 580"]}
    with pytest.raises(BadNodesError, match="n1: driver 570 instead of 580"):
        compare_reports(reports)
