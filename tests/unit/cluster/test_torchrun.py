"""The launcher of a node: exit statuses, signals, and that no process outlives it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_rlvr.cluster import torchrun
from megatron_rlvr.cluster.outcome import Outcome
from megatron_rlvr.cluster.rank_exit import RankExit
from megatron_rlvr.cluster.torchrun import outcome_of
from tests.ports import reserved_port
from tests.processes import environment

RANK = """
import signal, sys, time
signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75))
print("ready", flush=True)
if sys.argv[1] == "wait for a signal":
    while True:
        time.sleep(1)
print("error: nothing to learn from", file=sys.stderr)
sys.exit(int(sys.argv[1]))
"""


@pytest.mark.parametrize(
    ("codes", "asked", "status"),
    [
        ([75, 75], False, 75),
        ([-signal.SIGUSR1, 75], True, 75),
        ([-signal.SIGUSR1, 75], False, 128 + signal.SIGUSR1),
        ([1, 2, 75], True, 2),
        ([-signal.SIGKILL, 75], True, 137),
        ([75, 1], False, 1),
    ],
)
def test_exit_status(codes: list[int], asked: bool, status: int, tmp_path: Path) -> None:
    exits = [RankExit(rank, code, float(rank)) for rank, code in enumerate(codes)]
    assert outcome_of(exits, tmp_path, asked).status == status


def test_reason_names_the_rank_that_crashed_and_its_error(tmp_path: Path) -> None:
    (tmp_path / "rank_3.log").write_text("Traceback:\n  File x\nValueError: too hot\n[W] a warning at exit\n")
    outcome = outcome_of([RankExit(1, 75, 1.0), RankExit(3, 1, 2.0)], tmp_path, asked=False)
    assert outcome.reason.endswith(" ended with status 1: ValueError: too hot")
    assert outcome.reason.startswith("rank 3 on ")


def test_nodes_that_end_together_leave_an_outcome_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchrun, "StopRequest", lambda: None)
    monkeypatch.setattr(torchrun, "exit_with_parent", lambda: None)
    monkeypatch.setattr(torchrun, "await_outcomes", lambda *_: None)
    arguments = [
        "--nnodes=3",
        "--nproc-per-node=1",
        "--rdzv-id=1",
        "--rdzv-endpoint=a:1",
        f"--logs={tmp_path}",
        "--",
        "x",
    ]
    nodes = ["n1", "n2.cluster", "n3.cluster"]
    ending: list[str] = []

    def replace(partial: Path, target: Path) -> None:
        # The others write theirs between this one's writing and renaming.
        if nodes:
            end(nodes.pop())
        partial.rename(target)

    def end(node: str) -> None:
        ending.append(node)
        with monkeypatch.context() as patch:
            patch.setenv("SLURMD_NODENAME", node)
            patch.setattr(torchrun, "run", lambda *_: Outcome(7, f"of {node}"))
            assert torchrun.main(arguments) == 7

    monkeypatch.setattr(Path, "replace", replace)
    end(nodes.pop())
    assert len(ending) == 3
    found = {file.name: file.read_text() for file in tmp_path.iterdir()}
    assert found == {f"outcome.{node}": f"7 of {node}\n" for node in ending}


def _start(tmp_path: Path, argument: str) -> subprocess.Popen[bytes]:
    (tmp_path / "rank.py").write_text(RANK)
    options = ["--nnodes=1", "--nproc-per-node=2", "--rdzv-id=1", "--rdzv-endpoint=localhost:0"]
    options += [f"--logs={tmp_path / 'logs'}", "--", str(tmp_path / "rank.py"), argument]
    command = [sys.executable, "-m", "megatron_rlvr.cluster.torchrun", *options]
    return subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _ranks(tmp_path: Path) -> list[int]:
    """Process ids of the running ranks, once both have reported that they are ready."""
    logs = [tmp_path / "logs" / f"rank_{rank}.log" for rank in (0, 1)]
    while not all(log.is_file() and "ready" in log.read_text() for log in logs):
        time.sleep(0.05)
    return _alive(tmp_path)


def _alive(tmp_path: Path) -> list[int]:
    found = subprocess.run(["pgrep", "-f", "--", f"-u {tmp_path / 'rank.py'}"], capture_output=True, text=True)
    return [int(pid) for pid in found.stdout.split()]


def _outcome(tmp_path: Path) -> str:
    """The line with the status and the reason."""
    return next((tmp_path / "logs").glob("outcome.*")).read_text().splitlines()[0]


def test_status_and_reason_of_the_ranks_come_through(tmp_path: Path) -> None:
    assert _start(tmp_path, "2").wait() == 2
    assert _outcome(tmp_path).startswith("2 rank ")
    assert _outcome(tmp_path).endswith("error: nothing to learn from")


def test_a_signal_reaches_the_ranks(tmp_path: Path) -> None:
    launcher = _start(tmp_path, "wait for a signal")
    assert len(_ranks(tmp_path)) == 2
    launcher.send_signal(signal.SIGUSR1)
    assert launcher.wait() == 75
    assert _outcome(tmp_path).startswith("75 ")


def test_a_node_whose_ranks_stop_later_than_the_first_has_stopped_too(tmp_path: Path) -> None:
    program = """
import os, sys, time
while os.environ["RANK"] == "1" and not os.path.exists(sys.argv[1]):
    time.sleep(0.01)
sys.exit(75)
"""
    (tmp_path / "rank.py").write_text(program)
    options = ["--nnodes=2", "--nproc-per-node=1", "--rdzv-id=1"]
    nodes = ["127.0.0.1", "127.0.0.2"]
    first_outcome = tmp_path / "logs" / f"outcome.{nodes[0]}"
    options += [f"--logs={tmp_path / 'logs'}", "--", str(tmp_path / "rank.py"), str(first_outcome)]
    with reserved_port() as port:
        endpoint = f"--rdzv-endpoint=127.0.0.1:{port}"
        command = [sys.executable, "-m", "megatron_rlvr.cluster.torchrun", endpoint, *options]
        launchers = [subprocess.Popen(command, env=environment() | {"SLURMD_NODENAME": node}) for node in nodes]
        assert [launcher.wait() for launcher in launchers] == [75, 75]
    outcomes = [(tmp_path / "logs" / f"outcome.{node}").read_text() for node in nodes]
    assert outcomes == [
        f"75 rank {rank} on {node} ended with status 75: its log is empty\n" for rank, node in enumerate(nodes)
    ]


def test_no_rank_outlives_a_killed_launcher(tmp_path: Path) -> None:
    launcher = _start(tmp_path, "wait for a signal")
    ranks = _ranks(tmp_path)
    assert len(ranks) == 2
    os.kill(launcher.pid, signal.SIGKILL)
    launcher.wait()
    while _alive(tmp_path):
        time.sleep(0.02)
