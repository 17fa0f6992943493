"""The all-reduce of the preflight, and the search for the node that breaks it."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch.distributed as dist

from megatron_rlvr.cluster import network_check
from megatron_rlvr.cluster.all_reduce import timed_all_reduce
from megatron_rlvr.cluster.node_checks import BadNodesError
from megatron_rlvr.cluster.node_rendezvous import NodeRendezvous
from megatron_rlvr.errors import UserError
from tests.processes import environment


def head(nodes: int) -> NodeRendezvous:
    """Return the rendezvous of the first of `nodes` nodes, the others of which never connect."""
    return NodeRendezvous([f"n{number + 1}" for number in range(nodes)], 0, ("localhost", 0), 600.0)


@pytest.mark.parametrize("nodes", [3, 4, 5, 7, 16])
def test_every_node_has_two_different_partners(nodes: int) -> None:
    rounds = network_check.search_rounds(nodes)
    assert len(rounds) == 2 + nodes % 2
    for groups in rounds:
        members = [i for group in groups for i in group]
        assert len(members) == len(set(members))
    edges = [frozenset(group) for groups in rounds for group in groups]
    assert len(set(edges)) == len(edges) == nodes
    assert all(sum(i in edge for edge in edges) == 2 for i in range(nodes))


@pytest.mark.parametrize(
    ("nodes", "bad", "left_out"),
    [
        (1, {0}, ["n1"]),
        (2, {1}, ["n2"]),
        (2, set(), ["n2"]),
        (3, {0}, ["n1"]),
        (3, {2}, ["n3"]),
        (4, {2}, ["n3"]),
        (4, {1, 2}, ["n2", "n3"]),
        (5, {4}, ["n5"]),
        (5, set(), ["n5"]),
        (16, {0, 3}, ["n1", "n4"]),
        (2, {0, 1}, "on each of them alone"),
        (4, {0, 1, 2, 3}, "between any two of them"),
    ],
)
def test_the_node_whose_network_fails_is_found(
    nodes: int, bad: set[int], left_out: list[str] | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def all_reduce_in_groups(_rendezvous: object, name: str, groups: list[list[int]], *_: object) -> dict[int, object]:
        # All nodes together may fail even if every pair of them succeeds.
        broken = [group for group in groups if bad & set(group) or name == "all"]
        success = {"seconds": 0.5, "bytes": 1e9}
        return {node: "it did not end in time" if group in broken else success for group in groups for node in group}

    monkeypatch.setattr(network_check, "all_reduce_in_groups", all_reduce_in_groups)
    with pytest.raises((BadNodesError, UserError)) as caught:
        network_check.check_network(head(nodes), nodes, 8, True)
    assert f"the all-reduce over {nodes} nodes fails (it did not end in time)" in str(caught.value)
    if isinstance(left_out, str):
        assert isinstance(caught.value, UserError) and left_out in str(caught.value)
    else:
        assert isinstance(caught.value, BadNodesError) and caught.value.nodes == left_out


def test_an_all_reduce_that_nobody_answers_ends_at_its_deadline() -> None:
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    # Without the deadline, torch would wait for half an hour.
    assert isinstance(timed_all_reduce(("localhost", store.port), "alone", [0, 1], 0, 1, False, 1.0), str)


def test_an_all_reduce_works_in_a_fork_of_a_process_that_has_used_torchs_threads() -> None:
    program = """
import torch, torch.distributed as dist
from megatron_rlvr.cluster.all_reduce import timed_all_reduce
torch.set_num_threads(2)
torch.full((1 << 22,), 1.0).sum()
store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
result = timed_all_reduce(("localhost", store.port), "both", [0], 0, 2, False, 120.0)
assert result["bytes"] == 4 * 2**20 and result["seconds"] > 0, result
"""
    variables = environment() | {"OMP_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", program], env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
