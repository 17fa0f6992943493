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


class ByFixture(LoadScopeScheduling):
    """Keep the tests of a file in one process, and those of a folder where they share servers, a build or processes."""

    def _split_scope(self, nodeid: str) -> str:
        file = Path(nodeid.split("::", 1)[0])
        shares = file.parent.parent.name == "integration" or file.parent.name in ("csrc", "families")
        return str(file.parent if shares else file)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByFixture:
    """The scheduler of pytest-xdist; replaces the one that ``--dist`` names."""
    return ByFixture(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With several processes, start the two longest folders first, so that no process waits for them at the end."""
    if hasattr(config, "workerinput"):
        longest = ("tests/integration/slurm", "tests/integration/sglang")
        items.sort(key=lambda item: not item.nodeid.startswith(longest))


@pytest.fixture(scope="module", autouse=True)
def _end_threads_of_earlier_modules() -> None:
    """Free the process groups that earlier modules left in reference cycles, once there are many.

    Each gloo group has threads, of which one wakes 100 times a second: 200 groups keep a sixth of a core busy.
    """
    if psutil.Process().num_threads() > 100:
        gc.collect()


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
