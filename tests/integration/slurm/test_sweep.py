"""The entropy sweep: a job array and the report that waits for it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from megatron_rlvr.telemetry.metrics import read_metrics
from tests.integration.slurm.cluster import Cluster
from tests.integration.slurm.jobs import Settings
from tests.processes import DEADLINE_SECONDS, ROOT


def test_array_and_its_report(
    cluster: Cluster, settings: Settings, tmp_path: Path, job_environment: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SBATCH_ARRAY_INX", "0,3-4")
    monkeypatch.setenv("SWEEP_DIRECTORY", str(tmp_path / "sweep"))
    monkeypatch.setenv("SBATCH_OUTPUT", f"{tmp_path}/%x-%A_%a.out")
    for name, value in cluster.environment.items():
        monkeypatch.setenv(name, value)
    script = ROOT / "examples" / "slurm" / "entropy-sweep.sh"
    command = ["bash", str(script), *settings.overrides(), "steps=3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_SECONDS)
    assert done.returncode == 0, done.stderr
    array, report = done.stdout.split()
    assert cluster.job(report)["Dependency"].startswith(f"afterany:{array}")
    assert cluster.finished(report)["JobState"] == "COMPLETED"
    runs = {"constant-0", "target-entropy-0", "constant-1"}
    assert {folder.name for folder in (tmp_path / "sweep").iterdir()} == {*runs, "report"}
    for run in runs:
        assert len(read_metrics(tmp_path / "sweep" / run)) == 3
    assert list((tmp_path / "sweep" / "report").glob("*.png"))
    text = next(tmp_path.glob("entropy-sweep-report-*.out")).read_text()
    assert text.count("3/3") == 3
    for element in (0, 3, 4):
        assert not cluster.orphans(cluster.job(f"{array}_{element}")["JobId"])
