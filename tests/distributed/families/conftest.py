"""Small models of all families, and one torchrun for the layouts of all tests in this folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.families import make_families
from tests.processes import ROOT, launch


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_families(tmp_path_factory.mktemp("families"))


@pytest.fixture(scope="session")
def measured(request: pytest.FixtureRequest, folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of what four processes measured: the `jobs` of every file of this folder that takes part."""
    output = tmp_path_factory.mktemp("measured")
    files = {item.module for item in request.session.items if item.path.parent == Path(__file__).parent}
    jobs = [job for file in sorted(files, key=lambda module: module.__name__) for job in file.jobs(folders)]
    jobs.sort(key=lambda job: len(job["ranks"]) < 4)  # first those for which no process should be busy elsewhere
    launch([str(ROOT / "tests" / "layout_jobs.py"), str(output), *map(json.dumps, jobs)], 4, check=True)
    return output
