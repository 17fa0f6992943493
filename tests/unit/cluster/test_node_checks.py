"""What one node finds out by itself before a job trains."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_rlvr.cluster.node_checks import NodeReport, check_node, gpus_of_this_node
from megatron_rlvr.config import load_config


def test_every_node_that_trains_needs_the_reference(run_yaml: Path, small_model: Path, tmp_path: Path) -> None:
    def problems(trains: bool, *overrides: str) -> list[str]:
        return check_node("n1", load_config(run_yaml, overrides), 0, trains, tmp_path / "report").problems

    missing = f"reference.path={tmp_path / 'reference'}"
    found = problems(True, "algorithm.kl_coefficient=0.1", missing)
    assert found == [f"{tmp_path}/reference/config.json cannot be read: No such file or directory"]
    assert problems(True, "algorithm.kl_coefficient=0.1", f"reference.path={small_model}") == []
    assert problems(True, missing) == problems(False, "algorithm.kl_coefficient=0.1", missing) == []


def nvidia_smi(folder: Path, prints: str, status: int = 0) -> None:
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\nprintf '{prints}'\nexit {status}\n")
    program.chmod(0o755)


@pytest.mark.parametrize(
    ("prints", "status", "problem"),
    [
        ("No devices were found\\n", 6, "nvidia-smi failed: No devices were found"),
        ("No devices were found\\n", 0, "nvidia-smi does not report the memory of a GPU: No devices were found"),
        ("NVIDIA H100, [Unknown Error], 580.65.06\\n", 0, "of a GPU: NVIDIA H100, [Unknown Error], 580.65.06"),
        (
            "NVIDIA H100, 81559, 580.65.06\\nUnable to determine the device handle\\n",
            0,
            "of a GPU: Unable to determine",
        ),
    ],
)
def test_a_broken_gpu_is_a_problem_of_its_node(
    prints: str, status: int, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvidia_smi(tmp_path, prints, status)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    report = NodeReport("n1")
    assert gpus_of_this_node(report) == [] and len(report.problems) == 1
    assert problem in report.problems[0]


def test_a_node_of_servers_needs_the_gpus_that_slurm_gave_it(
    run_yaml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvidia_smi(tmp_path, "NVIDIA H100, 80GB HBM3, 81559, 580.65.06\\n")
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "2")
    report = check_node("n3", load_config(run_yaml), 8, False, tmp_path / "report")
    assert report.gpus == [("NVIDIA H100, 80GB HBM3", 81559)] and report.versions["driver"] == "580.65.06"
    assert report.problems == ["the node has 1 visible GPUs but needs 2"]
