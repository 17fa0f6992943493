"""The clipped objectives at any log-ratio: finite, exact wherever float32 holds the product, saturated elsewhere."""

import itertools
import math

import pytest
import torch

from megatron_rlvr import ops
from megatron_rlvr.control import AffineThreshold, ClipThresholds
from megatron_rlvr.control.regions import entropy_change, gradient_norm
from megatron_rlvr.ops import reference

LARGEST = torch.finfo(torch.float32).max
THRESHOLDS = {
    "static": ClipThresholds(),
    "dynamic": ClipThresholds(AffineThreshold(0.3, -0.13), AffineThreshold(0.5, -0.25)),
    "steep": ClipThresholds(upper=AffineThreshold(3.0, -2.8)),
}
LOG_RATIOS = [
    0.0,
    *(s * x for x in (1e-3, 1.0, 20.0, 87.0, 88.6, 88.8, 100.0, 176.0, 1e4, 1e30, 3e38) for s in (1, -1)),
]
LOG_RATIOS += [math.inf, -math.inf]
ADVANTAGES = [0.0, 1.0, -1.0, 1e-30, -1e-30, 3e-39, -3e-39, 1e30, -1e30, 3e38, -3e38]
WEIGHTS = [1.0, 0.0, 1e-25, 1.9]


def cases():
    """(logprob, old log-prob, advantage, weight) of every combination, float32 [T]."""
    rows = [
        (min(x, 0.0) - 0.5, -max(x, 0.0) - 0.5, a, w) for x, a, w in itertools.product(LOG_RATIOS, ADVANTAGES, WEIGHTS)
    ]
    rows += [(-math.inf, -math.inf, a, w) for a, w in itertools.product(ADVANTAGES, WEIGHTS)]
    return torch.tensor(rows).T.contiguous().unbind(0)


def expected(logprob, old, advantage, weight, thresholds, dual_clip):
    """(value, derivative) of one token in float64, from Python floats that are float32 numbers."""
    if advantage == 0:
        return 0.0, 0.0
    log_ratio = 0.0 if logprob == old else logprob - old
    ratio = math.exp(log_ratio) if log_ratio < 700 else math.inf
    low, high = thresholds.ratio_bounds(math.exp(old))
    bound = None
    if advantage > 0 and ratio > high:
        bound = high
    elif advantage < 0 and ratio < low:
        bound = low
    elif advantage < 0 and dual_clip is not None and ratio > dual_clip:
        bound = dual_clip
    factor = min(ratio if bound is None else bound, 1e300)
    value = max(-LARGEST, min(LARGEST, factor * (advantage * weight)))
    return value, value if bound is None else 0.0


def check(found, wanted):
    """Relative to the value; a float32 below 1e-38 has fewer digits."""
    torch.testing.assert_close(found.double().cpu(), torch.tensor(wanted, dtype=torch.float64), rtol=1e-6, atol=3e-45)


@pytest.mark.parametrize("dual_clip", [None, 3.0])
@pytest.mark.parametrize("name", THRESHOLDS)
@pytest.mark.parametrize("implementation", ["operator", "reference"])
def test_value_and_gradient_at_any_log_ratio(implementation, name, dual_clip):
    logprob, old, advantage, weight = cases()
    thresholds = THRESHOLDS[name]
    scalars = ops.objective.four_scalars(thresholds)
    kernels = reference if implementation == "reference" else torch.ops.megatron_rlvr
    objective, derivative, *_ = kernels.clipped_objective(
        logprob, old, advantage, None, weight, None, *scalars, dual_clip
    )
    rows = zip(*(tensor.tolist() for tensor in (logprob, old, advantage, weight)), strict=True)
    values, slopes = zip(*(expected(*row, thresholds, dual_clip) for row in rows), strict=True)
    assert LARGEST in values and -LARGEST in values  # both signs overflow somewhere: A = 3e38 times a weight of 1.9
    check(objective, values)
    check(derivative, slopes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dual_clip", [None, 3.0])
def test_gradients_through_autograd_are_finite_and_the_derivative(dual_clip, dtype):
    logprob, old, advantage, weight = (tensor.to(dtype) for tensor in cases())
    leaf = logprob.clone().requires_grad_()
    for operator in (ops.clipped_objective, lambda *a, **k: ops.bounded_objective(*a[:3], 0.8, 1.2, **k)):
        found = operator(leaf, old, advantage, THRESHOLDS["static"], dual_clip=dual_clip, weight=weight)
        (gradient,) = torch.autograd.grad(found.objective.sum(), leaf)
        assert found.objective.isfinite().all()
        assert torch.equal(gradient, torch.where(found.gate == 0, found.objective.detach(), 0.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_masked_garbage_reaches_neither_value_nor_gradient(dtype):
    garbage = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e38, -1e38], dtype=dtype)
    logprob, old, advantage = (t.flatten() for t in torch.meshgrid(garbage, garbage, garbage, indexing="ij"))
    leaf = logprob.clone().requires_grad_()
    mask = torch.zeros(len(leaf), dtype=torch.bool)
    found = ops.clipped_objective(leaf, old, advantage, THRESHOLDS["dynamic"], dual_clip=2.0, mask=mask, entropy=old)
    (gradient,) = torch.autograd.grad(found.objective.sum(), leaf)
    assert found.objective.abs().max() == gradient.abs().max() == 0
    assert not found.region_counts.any()


def test_an_infinite_advantage_or_weight_stays_visible():
    one, inf = torch.ones(1), torch.full((1,), torch.inf)
    for implementation in (reference, torch.ops.megatron_rlvr):
        for advantage, weight in ((inf, one), (-inf, one), (one, inf), (-one, inf), (inf, 0 * one)):
            objective = implementation.clipped_objective(
                -one, -one, advantage, None, weight, None, 0.0, 0.2, 0.0, 0.2, None
            )[0]
            assert not objective.isfinite().any()


def test_the_fused_objective_at_any_log_ratio():
    """Its old log-probs are given; the loss weighs each token by its share, so that it stays finite, too."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(3)
    old = torch.tensor([0.0, -1e-3, -50.0, -95.0, -120.0, -1e4, -1e30, -3e38, -torch.inf]).repeat(3)
    hidden, weight = torch.randn(27, 8, generator=generator), torch.randn(11, 8, generator=generator)
    advantage = torch.tensor([1.0, -1.0, 0.0]).repeat_interleave(9)
    hidden.requires_grad_(), weight.requires_grad_()
    share = torch.full((27,), 1e-6)
    fused = ops.fused_linear_objective(
        hidden, weight, torch.arange(27) % 11, old, advantage, THRESHOLDS["dynamic"], token_weight=share
    )
    fused.loss.backward()
    for tensor in (fused.loss, fused.objective, hidden.grad, weight.grad):
        assert tensor.isfinite().all()
    assert fused.objective.min() == -LARGEST


def test_entropy_change_and_gradient_norm_at_any_log_ratio():
    logprob, old, advantage, _ = cases()
    entropy, squared, squared_logprob = (torch.full_like(logprob, x) for x in (0.7, 0.4, -0.3))
    change = entropy_change(logprob, entropy, advantage, squared, squared_logprob, old_logprob=old)
    norm = gradient_norm(logprob, advantage, squared)
    assert change.isfinite().all() and norm.isfinite().all()
    for row in range(len(change)):
        x, y, a = logprob[row].item(), old[row].item(), advantage[row].item()
        p, log_ratio = math.exp(x), 0.0 if x == y else x - y
        coefficient = (p * (x + 0.7) if p else 0.0) - (-0.3 + 0.7 * 0.4)
        ratio = math.exp(log_ratio) if log_ratio < 300 else 1e300
        exact = max(-LARGEST, min(LARGEST, -a * coefficient * ratio))
        assert change[row].item() == pytest.approx(exact, rel=1e-5, abs=3e-45)
        exact = min(LARGEST, a**2 * max(1 - 2 * p + 0.4, 0.0))
        assert norm[row].item() == pytest.approx(exact, rel=1e-5, abs=3e-45)
