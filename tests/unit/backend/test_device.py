"""What loading megatron-core does to a process, each in one of its own."""

from __future__ import annotations

import pytest
import torch

from tests.conftest import launch

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


def test_torch_and_the_garbage_collector_are_as_before() -> None:
    launch(["-c", LOADED], processes=1, check=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has the fusions compiled")
def test_fusions_run_uncompiled_on_the_cpu() -> None:
    launch(["-c", LOADED + UNCOMPILED], processes=1, check=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="nothing is read as the CPU")
def test_megatron_loaded_too_early_is_named() -> None:
    done = launch(["-c", TOO_LATE], processes=1, check=False)
    assert done.returncode == 1 and "call install() first" in done.stderr
