"""Fixtures for all tests, and the order in which several test processes take them."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Any

import psutil
import pytest
from xdist.scheduler import LoadScopeScheduling

from tests.small_model import make_small_model, write_problems

# OpenMP reads this when torch loads, here and in the processes that tests start. The tests run more threads than there
# are cores; threads that spin while they wait would slow down the ones they wait for.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


_TOGETHER = ("tests/integration/sglang", "tests/csrc", "tests/distributed/families")
"""Folders whose tests share a server, a build or processes."""
_LONGEST = (
    "tests/integration/sglang",
    "tests/integration/slurm/test_survival.py",
    "tests/integration/slurm",
    "tests/distributed/test_layouts.py",
)
"""What starts first, so that no process waits for it at the end."""


class ByFixture(LoadScopeScheduling):
    """Keep the tests of a file in one process, and those of some folders.

    Each process that runs tests on Slurm has a virtual cluster, which starts in seconds; its jobs mostly wait.
    """

    def _split_scope(self, nodeid: str) -> str:
        file = Path(nodeid.split("::", 1)[0])
        return str(file.parent if str(file.parent) in _TOGETHER else file)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByFixture:
    """The scheduler of pytest-xdist; replaces the one that ``--dist`` names."""
    return ByFixture(config, log)


def _place(test: str) -> int:
    return next((place for place, start in enumerate(_LONGEST) if test.startswith(start)), len(_LONGEST))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With several processes, take the longest first."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: _place(item.nodeid))


def pytest_collection_finish() -> None:
    """Keep what was imported, a million objects, out of garbage collections, which then take milliseconds."""
    gc.collect()
    gc.freeze()


_threads = {"kept": 0}  # by what is in use; they stay after a garbage collection


@pytest.fixture(autouse=True)
def _end_threads_of_earlier_tests() -> None:
    """Free the process groups that earlier tests left in reference cycles, once there are many.

    Each gloo group has threads, of which one wakes 100 times a second: 200 groups keep a sixth of a core busy.
    """
    process = psutil.Process()
    if process.num_threads() > _threads["kept"] + 60:
        gc.collect()
        _threads["kept"] = process.num_threads()


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder: Qwen2, 4 layers, hidden size 32, random weights."""
    return make_small_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def problems(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSONL file of 64 prompts that the small model's tokenizer covers."""
    return write_problems(tmp_path_factory.mktemp("data") / "train.jsonl")


@pytest.fixture
def run_yaml(tmp_path: Path, small_model: Path, problems: Path) -> Path:
    """A configuration of six quick steps on the small model. Its reward is arbitrary, but differs within groups."""
    path = tmp_path / "run.yaml"
    path.write_text(
        f"""
name: small
steps: 6
seed: 3
run_directory: {tmp_path / "run"}
threads: 1
model: {{path: {small_model}}}
data: {{train: {problems}, heldout: {problems}}}
verifier: {{name: "tests.rewards:letter_sum", workers: 0}}
rollout: {{prompts_per_step: 8, samples_per_prompt: 4, max_tokens: 10}}
algorithm: {{epochs: 2, minibatches: 2, schedule: {{name: increase-then-decrease}}}}
optimizer: {{learning_rate: 3.0e-3}}
evaluation: {{prompts: 8, samples: 4}}
checkpoint: {{every: 1, keep: 2}}
telemetry: {{tensorboard: false, plots: false}}
"""
    )
    return path
