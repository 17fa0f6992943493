"""Trainer processes that tests start, alone or under torchrun."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.forked import run_forked

ROOT = Path(__file__).resolve().parent.parent
DEADLINE_SECONDS = 1800.0
"""How long a test waits for what must happen: against hanging only, so it is far longer than a busy machine needs."""


def environment() -> dict[str, str]:
    """Environment variables of a trainer process: this checkout first on the path, one thread."""
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


def run_trainer(*arguments: object, processes: int = 1, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run ``python -m megatron_rlvr.train``; see `fork`."""
    return fork(["-m", "megatron_rlvr.train", *map(str, arguments)], processes, check)


def run_trainers(runs: Sequence[Sequence[object]], processes: int = 1) -> None:
    """Run several trainings one after another in the same processes."""
    lines = [json.dumps([str(a) for a in run]) for run in runs]
    fork([str(ROOT / "tests" / "train_each.py"), *lines], processes)


def fork(
    program: list[str], processes: int, check: bool = True, deadline_seconds: float = DEADLINE_SECONDS
) -> subprocess.CompletedProcess[str]:
    """As `launch`, in processes that have imported the trainer already, and without torchrun; see `tests.forked`."""
    return _checked(run_forked(program, processes, environment(), ROOT, deadline_seconds), check)


def launch(program: list[str], processes: int, check: bool) -> subprocess.CompletedProcess[str]:
    """Run a Python program, under torchrun if ``processes`` > 1; fail the test on a nonzero status if ``check``."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    done = subprocess.run(
        [*command, *program], env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE_SECONDS
    )
    return _checked(done, check)


def _checked(done: subprocess.CompletedProcess[str], check: bool) -> subprocess.CompletedProcess[str]:
    if check and done.returncode:
        pytest.fail(f"status {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}")
    return done
