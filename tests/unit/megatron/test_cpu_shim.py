"""The effect of importing `megatron_rlvr.megatron` on a process; each test starts a process."""

from __future__ import annotations

import pytest
import torch

from tests.processes import launch

LOADED = """
import gc, sys, torch
import megatron_rlvr.megatron
assert "megatron.core" not in sys.modules  # reading a configuration must neither load it nor initialise CUDA
compiler = torch.compile
import megatron.core
assert torch.compile is compiler and gc.isenabled() and gc.get_freeze_count() > 100_000
"""
UNCOMPILED = """
from megatron.core.fusions.fused_bias_swiglu import swiglu
assert "torch._inductor.compile_fx" not in sys.modules
assert swiglu(torch.ones(2, 4, device="cuda")).device.type == "cpu"
assert "torch._inductor.compile_fx" not in sys.modules
"""
ANY_ORDER = """
import torch
import megatron.core
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron_rlvr.megatron.model import PolicyModel
assert issubclass(PolicyModel, GPTModel)
assert torch.zeros(2, device="cuda").device.type == "cpu"
"""


def test_torch_and_the_garbage_collector_are_restored() -> None:
    launch(["-c", LOADED], processes=1, check=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="fusions are compiled on a GPU")
def test_fusions_run_uncompiled_on_the_cpu() -> None:
    launch(["-c", LOADED + UNCOMPILED], processes=1, check=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU needs no shim")
def test_megatron_core_may_be_imported_first() -> None:
    launch(["-c", ANY_ORDER], processes=1, check=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the missing packages matter")
def test_packages_that_only_a_gpu_uses_are_not_missed() -> None:
    program = ["-W", "always::UserWarning", "-c", "import megatron_rlvr.megatron.bridge"]
    assert "not installed" not in launch(program, processes=1, check=True).stderr
