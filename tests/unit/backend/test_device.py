"""What loading megatron-core does to a process, each in one of its own."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from tests.conftest import ROOT, environment

LOADED = """
import gc, sys, torch
from megatron_rlvr.backend import device
compiler = torch.compile
device.install()
device.install()  # once is enough, twice does no harm
assert "megatron.core" in sys.modules
assert torch.compile is compiler and gc.isenabled() and gc.get_freeze_count() > 100_000
"""
UNCOMPILED = """
from megatron.core.fusions.fused_bias_swiglu import swiglu
assert "torch._inductor.compile_fx" not in sys.modules
assert swiglu(torch.ones(2, 4, device="cuda")).device.type == "cpu"
assert "torch._inductor.compile_fx" not in sys.modules
"""
TOO_LATE = """
import megatron.core
from megatron_rlvr.backend import device
device.install()
"""


def run(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", program], env=environment(), cwd=ROOT, capture_output=True, text=True)


def test_torch_and_the_garbage_collector_are_as_before() -> None:
    done = run(LOADED)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has the fusions compiled")
def test_fusions_run_uncompiled_on_the_cpu() -> None:
    done = run(LOADED + UNCOMPILED)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="nothing is read as the CPU")
def test_megatron_loaded_too_early_is_named() -> None:
    done = run(TOO_LATE)
    assert done.returncode == 1 and "call install() first" in done.stderr
