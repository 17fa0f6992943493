"""Trainer processes that tests start, alone or under torchrun."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DEADLINE_SECONDS = 1800.0
"""How long a test waits for what must happen: against hanging only, so it is far longer than a busy machine needs."""


def environment() -> dict[str, str]:
    """Environment variables of a trainer process: this checkout first on the path, one thread."""
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


def run_trainer(*arguments: object, processes: int = 1, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run ``python -m megatron_rlvr.train``; see `launch`."""
    return launch(["-m", "megatron_rlvr.train", *map(str, arguments)], processes, check)


def run_trainers(runs: Sequence[Sequence[object]], processes: int = 1) -> None:
    """Run several trainings one after another in the same processes, which import torch and megatron-core once."""
    lines = [json.dumps([str(a) for a in run]) for run in runs]
    launch([str(ROOT / "tests" / "train_each.py"), *lines], processes, check=True)


def launch(
    program: list[str], processes: int, check: bool, deadline_seconds: float = DEADLINE_SECONDS
) -> subprocess.CompletedProcess[str]:
    """Run a Python program, under torchrun if ``processes`` > 1; fail the test on a nonzero status if ``check``."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    done = subprocess.run(
        [*command, *program], env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=deadline_seconds
    )
    if check and done.returncode:
        pytest.fail(f"status {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}")
    return done
