"""What the preflight finds out about a job before anything is started."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_rlvr.cluster import preflight
from megatron_rlvr.cluster.children import ChildError, start
from megatron_rlvr.cluster.collectives import timed_all_reduce
from megatron_rlvr.cluster.job_plan import plan
from megatron_rlvr.cluster.meeting import BadNodesError
from megatron_rlvr.cluster.node_checks import NodeReport
from megatron_rlvr.config import Config, load_config
from megatron_rlvr.errors import UserError
from tests.processes import ROOT, environment

FOLDER = ROOT / "examples" / "slurm"
GPU_SCRIPTS = [script for script in sorted(FOLDER.glob("*.sbatch")) if "--gpus-per-node=8" in script.read_text()]
TRAINING = [script for script in GPU_SCRIPTS if "\ntrain " in script.read_text()]
H100 = ("NVIDIA H100 80GB HBM3", 81559)


def _job(script: Path, folder: Path) -> tuple[Config, int, int, str]:
    """What a training script asks for: its configuration, nodes that train, all nodes, servers."""
    text = script.read_text()
    nodes = int(re.search(r"--nodes=(\d+)", text)[1])  # type: ignore[index]
    servers = re.search(r'"\$\{RLVR_SERVERS:=(\S+)\}"', text)
    command = re.search(r'\ntrain (\S+) (.*)"\$@"', text, re.S)
    assert servers and command
    name = Path(command[1]).stem
    folder.mkdir()
    shutil.copy(ROOT / "examples" / "configs" / "architectures" / f"{name}.json", folder / "config.json")
    overrides = command[2].replace("\\\n", " ").split()
    config = load_config(ROOT / command[1], [*overrides, f"model.path={folder}", f"data.train={script}"])
    train = nodes - int(servers[1].partition(":")[2] or 0)
    return config, train, nodes, servers[1]


@pytest.mark.parametrize("script", TRAINING, ids=lambda script: script.stem)
def test_the_plan_of_every_training_script_fits_h100(script: Path, tmp_path: Path) -> None:
    config, train, nodes, servers = _job(script, tmp_path / "model")
    reports = [NodeReport(f"n{i}", gpus=[H100] * 8) for i in range(nodes)]
    told = plan(config, reports, train, 8, servers)
    assert "\nfits: " in told
    # Servers beside training leave it less than the whole GPU.
    share = float(config.rollout.sglang.server["mem_fraction_static"]) if servers == "colocated" else 0.0
    assert f"of {81559 / 1024 * (1 - share):.1f} GiB" in told


def test_a_gpu_job_that_could_not_generate_is_refused(tmp_path: Path) -> None:
    config, train, nodes, _ = _job(FOLDER / "qwen2.5-math-7b-1node.sbatch", tmp_path / "model")
    reports = [NodeReport(f"n{i}", gpus=[H100] * 8) for i in range(nodes)]
    with pytest.raises(UserError, match="set RLVR_SERVERS=colocated or nodes:N"):
        plan(config, reports, train, 8)
    config.rollout.sglang.server = {}
    with pytest.raises(UserError, match=r"need rollout\.sglang\.server\.mem_fraction_static"):
        plan(config, reports, train, 8, "colocated")


def test_work_in_a_child() -> None:
    soon = time.monotonic() + 200
    here = os.getpid()
    assert start(os.getpid).result(soon) != here

    def refuse() -> None:
        raise UserError("model.path is empty")

    with pytest.raises(UserError, match=r"^model\.path is empty$"):
        start(refuse).result(soon)
    with pytest.raises(ChildError, match="ZeroDivisionError: integer division"):
        start(lambda: 1 // 0).result(soon)
    with pytest.raises(ChildError, match="it died"):
        start(lambda: os.kill(os.getpid(), signal.SIGKILL)).result(soon)
    hung = start(lambda: time.sleep(1000))
    with pytest.raises(ChildError, match="it did not end in time"):
        hung.result(time.monotonic() + 0.1)
    with pytest.raises(ProcessLookupError):
        os.kill(hung.pid, 0)


def test_the_head_plans_in_a_child_because_planning_binds_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(preflight, "plan", lambda *_: f"planned by {os.getpid()}")
    monkeypatch.setattr(preflight, "measure_network", lambda *_: "measured")
    monkeypatch.setattr(preflight, "gather_reports", lambda _: [NodeReport("n1", {"torch": "2"})])

    class Alone:
        nodes, index, deadline = ["n1"], 0, time.monotonic() + 60

        def left(self) -> float:
            return 60.0

        def say(self, *_: object) -> None:
            pass

    class Options:
        train_nodes, processes_per_node, servers, report = 1, 1, "none", tmp_path

    (tmp_path / "n1.json").write_text("{}")
    preflight.lead(Alone(), Config(run_directory=str(tmp_path)), Options())  # type: ignore[arg-type]
    planned = re.search(r"planned by (\d+)", capfd.readouterr().out)
    assert planned and int(planned[1]) != os.getpid()


def test_a_run_directory_that_is_not_shared_is_found_out(tmp_path: Path) -> None:
    for name in ("n1", "n3"):
        (tmp_path / f"{name}.json").write_text("{}")
    preflight.see_reports(["n1", "n3"], tmp_path, 0.3)
    with pytest.raises(BadNodesError, match=r"what n2 wrote into .* is not there on n1") as caught:
        preflight.see_reports(["n1", "n2", "n3"], tmp_path, 0.3)
    assert caught.value.nodes == ["n2"]
    with pytest.raises(UserError, match=r"what n2, n4 wrote .*: choose a run_directory on a file system"):
        preflight.see_reports(["n1", "n2", "n4"], tmp_path, 0.3)


def test_the_lock_of_an_attempt_that_ends_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    preflight.wait_for_lock(tmp_path, 0.1)  # there is none
    with (tmp_path / ".lock").open("w+") as held:
        held.write("4711")
        held.flush()
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="in use by process 4711"):
            preflight.wait_for_lock(tmp_path, 0.1)
    preflight.wait_for_lock(tmp_path, 0.1)

    def no_locks(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    preflight.wait_for_lock(tmp_path, 0.1)


@pytest.mark.parametrize("nodes", [3, 4, 5, 7, 16])
def test_every_node_has_two_different_partners(nodes: int) -> None:
    rounds = preflight.search_rounds(nodes)
    assert len(rounds) == 2 + nodes % 2
    for groups in rounds:
        members = [i for group in groups for i in group]
        assert len(members) == len(set(members))
    edges = [frozenset(group) for groups in rounds for group in groups]
    assert len(set(edges)) == len(edges) == nodes
    assert all(sum(i in edge for edge in edges) == 2 for i in range(nodes))


class Head:
    """A meeting in which this process is the head."""

    def __init__(self, nodes: int) -> None:
        self.nodes, self.index = [f"n{i + 1}" for i in range(nodes)], 0

    def left(self) -> float:
        return 60.0

    def say(self, _name: str, value: object) -> None:
        self.said = value

    def hear(self, *_: object) -> object:
        return self.said


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
def test_the_node_whose_network_fails_is_found_among_its_neighbours(
    nodes: int, bad: set[int], left_out: list[str] | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def all_reduce(_meeting: object, name: str, groups: list[list[int]], *_: object) -> dict[int, object]:
        # Also where every pair works, the whole may not.
        broken = [group for group in groups if bad & set(group) or name == "all"]
        well = {"seconds": 0.5, "bytes": 1e9}
        return {i: "it did not end in time" if group in broken else well for group in groups for i in group}

    monkeypatch.setattr(preflight, "all_reduce", all_reduce)
    with pytest.raises((BadNodesError, UserError)) as caught:
        preflight.measure_network(Head(nodes), nodes, 8, True)  # type: ignore[arg-type]
    assert f"the all-reduce over {nodes} nodes fails (it did not end in time)" in str(caught.value)
    if isinstance(left_out, str):
        assert isinstance(caught.value, UserError) and left_out in str(caught.value)
    else:
        assert isinstance(caught.value, BadNodesError) and caught.value.nodes == left_out


def test_an_all_reduce_that_nobody_answers_ends_at_its_deadline() -> None:
    import torch.distributed as dist

    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    # Without the deadline, torch would wait for half an hour.
    assert isinstance(timed_all_reduce(("localhost", store.port), "alone", [0, 1], 0, 1, False, 1.0), str)


def test_an_all_reduce_works_in_a_fork_of_a_process_that_has_used_torchs_threads() -> None:
    program = """
import torch, torch.distributed as dist
from megatron_rlvr.cluster.collectives import timed_all_reduce
torch.set_num_threads(2)
torch.full((1 << 22,), 1.0).sum()
store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
result = timed_all_reduce(("localhost", store.port), "both", [0], 0, 2, False, 120.0)
assert result["bytes"] == 4 * 2**20 and result["seconds"] > 0, result
"""
    variables = environment() | {"OMP_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", program], env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
