"""The operators as torch sees them: opcheck, FakeTensor, torch.compile."""

import pytest
import torch
from test_objective import PAPER
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_rlvr import ops

OPS = torch.ops.megatron_rlvr


def arguments(dtype=torch.float32, moments=False):
    torch.manual_seed(0)
    logits, targets = torch.randn(6, 50).to(dtype), torch.randint(0, 50, (6,))
    targets[2] = -100
    partials = OPS.row_statistics(logits, targets, 0, 50, 1.25, moments)
    state = OPS.combine_statistics(partials[None], targets, 50, 1.25)[2]
    return logits, targets, partials[None], state, torch.randn(6), torch.randn(6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("moments", [False, True])
def test_opcheck_statistics(dtype, moments):
    logits, targets, gathered, state, g, h = arguments(dtype, moments)
    torch.library.opcheck(OPS.row_statistics, (logits, targets, 0, 50, 1.25, moments))
    leaf = logits.clone().requires_grad_()
    torch.library.opcheck(OPS.token_statistics, (leaf, targets, gathered, 0, 50, 1.25))
    torch.library.opcheck(OPS.combine_statistics, (gathered, targets, 50, 1.25))
    torch.library.opcheck(OPS.logits_gradient, (logits, targets, state, g, h, 0, 1.25))
    torch.library.opcheck(OPS.logits_gradient_, (logits.clone(), targets, state, g, h, 0, 1.25))


@pytest.mark.parametrize("optional", [False, True])
def test_opcheck_objective(optional):
    logprob, old, advantage = torch.randn(3, 20).unbind(0)
    extra = (torch.rand(20) > 0.5, torch.rand(20), torch.rand(20)) if optional else (None, None, None)
    inputs = (logprob.clone().requires_grad_(), old, advantage, *extra, -0.25, 0.5, -0.13, 0.3)
    torch.library.opcheck(OPS.clipped_objective, inputs)
    torch.library.opcheck(OPS.clipped_objective, (*inputs, 1.5))
    bounds = (torch.rand(20), 1 + torch.rand(20))
    inputs = (logprob.clone().requires_grad_(), old, advantage, *bounds, *extra)
    torch.library.opcheck(OPS.bounded_objective, inputs)
    torch.library.opcheck(OPS.bounded_objective, (*inputs, 1.5))


def loss_of(hidden, weight, targets, old, advantage):
    found = ops.token_statistics(hidden @ weight.T, targets, temperature=0.9)
    clipped = ops.clipped_objective(found.logprob, old, advantage, PAPER, entropy=found.entropy.detach())
    return -(clipped.objective + 0.01 * found.entropy).sum(), clipped.region_counts


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_graph_equals_eager(backend):
    torch.manual_seed(0)
    hidden, weight = torch.randn(12, 8, requires_grad=True), torch.randn(40, 8, requires_grad=True)
    targets, old, advantage = torch.randint(0, 40, (12,)), -torch.rand(12) * 5, torch.randn(12)
    expected, counts = loss_of(hidden, weight, targets, old, advantage)
    gradients = torch.autograd.grad(expected, (hidden, weight))
    compiled = torch.compile(loss_of, fullgraph=True, backend=backend)
    found, compiled_counts = compiled(hidden, weight, targets, old, advantage)
    torch.testing.assert_close(found, expected)
    assert torch.equal(compiled_counts, counts)
    for mine, reference in zip(torch.autograd.grad(found, (hidden, weight)), gradients, strict=True):
        torch.testing.assert_close(mine, reference)


def test_fake_tensors_have_shapes_and_no_data():
    with FakeTensorMode():
        logits = torch.empty(4, 100, dtype=torch.bfloat16, requires_grad=True)
        found = ops.token_statistics(logits, torch.empty(4, dtype=torch.int64), second_moments=True, inplace=False)
        assert found.entropy.shape == found.sum_squared_prob.shape == (4,)
        assert found.logprob.dtype == torch.float32
        (found.logprob + found.entropy).sum().backward()
        assert logits.grad.shape == (4, 100)
        assert logits.grad.dtype == torch.bfloat16
        clipped = ops.clipped_objective(found.logprob, found.logprob, found.entropy, PAPER, entropy=found.entropy)
        assert clipped.region_counts.shape == (4,)
        assert clipped.gate.shape == (4,)
        assert clipped.gate.dtype == torch.uint8
