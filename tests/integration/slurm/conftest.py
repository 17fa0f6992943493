"""A virtual Slurm cluster for the tests of this folder. If it cannot run, they are skipped with the reason."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.slurm.cluster import Cluster, virtual_cluster, why_not
from tests.integration.slurm.jobs import Job, Settings
from tests.processes import ROOT, environment

NODES = 16


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if reason := why_not():
        pytest.skip(reason)
    with virtual_cluster(tmp_path_factory.mktemp("slurm"), NODES) as running:
        yield running


@pytest.fixture(scope="session")
def settings(small_model: Path, problems: Path) -> Settings:
    """Settings of a run with quick steps on a small random model."""
    return Settings(small_model, problems)


def set_job_environment(patch: pytest.MonkeyPatch) -> None:
    """Set the environment that a user's shell would pass to sbatch: the checkout under test and this Python."""
    for name, value in environment().items():
        if name in ("PYTHONPATH", "OMP_NUM_THREADS", "PYTHONWARNINGS"):
            patch.setenv(name, value)
    for name in [name for name in os.environ if name.startswith(("SLURM_", "RLVR_"))]:
        patch.delenv(name)
    patch.setenv("RLVR_ENVIRONMENT", f"venv:{sys.prefix}")


@pytest.fixture
def job_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    set_job_environment(monkeypatch)


@pytest.fixture
def quickstart(cluster: Cluster, settings: Settings, tmp_path: Path, job_environment: None) -> Job:
    """The example script on the small model, with a run directory of this test; not submitted yet."""
    return Job(cluster, ROOT / "examples" / "slurm" / "quickstart-cpu.sbatch", tmp_path / "run", settings.overrides())
