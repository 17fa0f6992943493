"""Small models of all families, and four processes for the layouts of all tests in this folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.families import make_families
from tests.processes import ROOT, fork

DEADLINE = 2400
"""Seconds for all layouts, which take a minute on two idle cores."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The first test that needs the measurements waits for all of them."""
    for item in items:
        if "measured" in getattr(item, "fixturenames", ()) and item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.timeout(DEADLINE + 60))


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
    program = [str(ROOT / "tests" / "layout_jobs.py"), str(output), *map(json.dumps, jobs)]
    fork(program, 4, deadline_seconds=DEADLINE)
    return output
