"""Tests that need a GPU: streams, CUDA graphs, the allocator, and that nothing waits for the device."""

import os
import subprocess
import sys

import pytest
import torch
from test_objective import PAPER
from test_statistics import exact, exact_gradient, make

from megatron_rlvr import ops
from tests.processes import DEADLINE_SECONDS

if not torch.cuda.is_available() or ops.backend() != "cuda":
    pytest.skip("no GPU, or the CUDA kernels were not built", allow_module_level=True)


@pytest.fixture(autouse=True)
def only_once(device):
    if device == "cpu":
        pytest.skip("about the GPU")


def step(logits, targets, old, advantage):
    """Statistics, clipped objective, and the gradient over the logits, without autograd's backward pass."""
    found = ops.token_statistics(logits, targets, temperature=0.9)
    clipped = ops.clipped_objective(found.logprob, old, advantage, PAPER, entropy=found.entropy.detach())
    loss = -(clipped.objective + 0.01 * found.entropy).sum()
    loss.backward()
    return loss.detach(), clipped.region_counts


def inputs(rows=64, width=5001, dtype=torch.bfloat16):
    logits, targets, *_ = make(rows, width, 3.0, 0, dtype)
    return logits, targets, -torch.rand(rows) * 5, torch.randn(rows)


def test_nothing_waits_for_the_device():
    logits, targets, old, advantage = inputs()
    hidden, weight = torch.randn(64, 32, requires_grad=True), torch.nn.Parameter(torch.randn(5001, 32))
    one = torch.ones(())
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(logits.requires_grad_(), targets, old, advantage)
        fused = ops.fused_linear_objective(hidden, weight, targets, old, advantage, PAPER, chunk_bytes=2**18)
        fused.loss.backward(one)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_captured_graph_gives_the_same_results():
    logits, targets, old, advantage = inputs()
    expected = logits.clone().requires_grad_()
    loss, regions = step(expected, targets, old, advantage)
    static = logits.clone().requires_grad_()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # autograd's own first calls allocate
        step(logits.clone().requires_grad_(), targets, old, advantage)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured, captured_regions = step(static, targets, old, advantage)
    for _ in range(3):
        with torch.no_grad():
            static.copy_(logits)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(captured, loss) and torch.equal(captured_regions, regions)
        assert torch.equal(static.detach(), expected.grad)  # the gradient has replaced the logits


def test_the_current_stream_is_used():
    logits, targets, *_ = inputs(2048, 50001, torch.float32)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)  # delays the copy that the kernel must see by a tenth of a second
        late = logits + 1.0
        found = ops.token_statistics(late, targets)
    side.synchronize()
    assert torch.equal(found.logprob, ops.token_statistics(logits + 1.0, targets).logprob)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_copy_of_the_logits(dtype):
    rows, width = 512, 151936
    logits = torch.randn(rows, width).mul_(3).to(dtype)
    targets = torch.randint(0, width, (rows,))
    g, h = torch.randn(rows), torch.randn(rows) * 0.1
    few = slice(0, 4)
    logprob, entropy, *_ = exact(logits[few], targets[few])
    gradient, _ = exact_gradient(logits[few], targets[few], g[few], h[few])
    leaf = logits.requires_grad_()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = ops.token_statistics(leaf, targets)
    torch.autograd.backward([found.logprob, found.entropy], [g, h])
    assert torch.cuda.max_memory_allocated() - before < 2**20  # 297 or 148 MiB of logits
    assert leaf.grad.data_ptr() == leaf.data_ptr()
    torch.testing.assert_close(found.logprob[few].double(), logprob, rtol=1.2e-7, atol=2e-6)
    torch.testing.assert_close(found.entropy[few].double(), entropy, rtol=0, atol=1e-5)
    rtol = 1e-5 if dtype == torch.float32 else 2.0**-7
    assert (leaf.grad[few].double() - gradient).norm() < rtol * gradient.norm()


def test_bad_rows_are_named_if_requested():
    program = """
import torch
from megatron_rlvr import ops
logits, targets = torch.randn(8, 300, device="cuda"), torch.zeros(8, dtype=torch.int64, device="cuda")
logits[5, 7] = torch.nan
ops.token_statistics(logits, targets)
"""
    environment = os.environ | {"MEGATRON_RLVR_CHECK": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=DEADLINE_SECONDS
    )
    assert "logits: NaN or +inf, or nothing above -inf, first in row 5" in done.stderr


def test_a_broken_promise_about_the_loss_scale_ends_the_process():
    program = """
import torch
torch.set_default_device("cuda")
from test_fused_linear import PAPER, make
from megatron_rlvr import ops
hidden, weight, targets, old, advantage, *_ = make()
weight.main_grad = torch.zeros_like(weight)
fused = ops.fused_linear_objective(hidden, weight, targets, old, advantage, PAPER, loss_scale=0.25)
(0.5 * fused.loss).backward()
torch.cuda.synchronize()
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=DEADLINE_SECONDS
    )
    assert done.returncode != 0
    assert "loss_scale=0.25 was promised" in done.stderr


def test_a_bad_row_spoils_no_other():
    logits, targets, g, h = make(6, 4099, 3.0, 0)
    logits[2, 17] = torch.nan
    leaf = logits.clone().requires_grad_()
    found = ops.token_statistics(leaf, targets)
    torch.autograd.backward([found.logprob, found.entropy], [g, h])
    rest = torch.arange(6) != 2
    assert found.logprob[2].isnan() and found.entropy[2].isnan()
    expected, _ = exact_gradient(logits[rest], targets[rest], g[rest], h[rest])
    assert (leaf.grad[rest].double() - expected).abs().max() < 1e-6
