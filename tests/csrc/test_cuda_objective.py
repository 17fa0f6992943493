"""The clipped objective of the CUDA kernel, compared with float64 and autograd."""

from __future__ import annotations

import math

import pytest
import torch
from emulated import Kernels
from torch import Tensor

STATIC = (0.2, 0.0, 0.2, 0.0)
DYNAMIC = (0.3, -0.13, 0.5, -0.25)  # lower intercept, lower slope, upper intercept, upper slope: the defaults


def tokens(count: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    old_logprob = -4 * torch.rand(count, generator=generator)
    advantage = torch.randn(count, generator=generator)
    advantage[::11] = 0
    return {
        "logprob": old_logprob + 0.5 * torch.randn(count, generator=generator),
        "old_logprob": old_logprob,
        "advantage": advantage,
        "mask": torch.rand(count, generator=generator) > 0.2,
        "weight": torch.rand(count, generator=generator),
        "entropy": 3 * torch.rand(count, generator=generator),
    }


def exact(t: dict[str, Tensor], clip: tuple[float, float, float, float]) -> tuple[Tensor, Tensor, list[int]]:
    """The gate written as in the paper, with the *current* probability; objective and gradient through autograd."""
    lower_intercept, lower_slope, upper_intercept, upper_slope = clip
    logprob = t["logprob"].double().requires_grad_()
    old_logprob, a = t["old_logprob"].double(), t["advantage"].double()
    ratio, p = (logprob - old_logprob).exp(), logprob.detach().exp()
    too_high = (ratio > 1 + upper_intercept + upper_slope * p) & (a > 0) & t["mask"]
    too_low = (ratio < 1 - lower_intercept - lower_slope * p) & (a < 0) & t["mask"]
    high = (1 + upper_intercept) / (1 - upper_slope * old_logprob.exp())
    low = (1 - lower_intercept) / (1 + lower_slope * old_logprob.exp())
    bounded = torch.where(too_high, high, torch.where(too_low, low, ratio))
    objective = torch.where(t["mask"], bounded * a * t["weight"].double(), 0.0)
    objective.sum().backward()
    surprise, h = -logprob.detach(), t["entropy"].double()
    regions = [(a > 0) & (surprise < h), (a > 0) & (surprise >= h), (a < 0) & (surprise < h), (a < 0) & (surprise >= h)]
    counts = [int(too_high.sum()), int(too_low.sum()), *(int((region & t["mask"]).sum()) for region in regions)]
    assert logprob.grad is not None
    return objective.detach(), logprob.grad, counts


@pytest.mark.parametrize("clip", [STATIC, DYNAMIC])
@pytest.mark.parametrize("count", [1, 255, 5001])
def test_objective_gradient_and_counts(kernels: Kernels, clip: tuple[float, float, float, float], count: int) -> None:
    for seed in range(3):
        t = tokens(count, seed)
        objective, gradient, counts = exact(t, clip)
        found = kernels.objective(
            t["logprob"], t["old_logprob"], t["advantage"], clip,
            mask=t["mask"], weight=t["weight"], entropy=t["entropy"],
        )  # fmt: skip
        torch.testing.assert_close(found[0].double(), objective, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(found[1].double(), gradient, rtol=1e-6, atol=1e-7)
        assert found[2].tolist() == counts
        if count > 1000:
            assert min(counts) > 0


@pytest.mark.parametrize("dual_clip", [math.inf, 1.3])
def test_bounds_per_token_and_the_gate(kernels: Kernels, dual_clip: float) -> None:
    t = tokens(5001, 8)
    low, high = 0.5 + 0.5 * torch.rand(5001), 1 + torch.rand(5001)
    logprob = t["logprob"].double().requires_grad_()
    ratio, a = (logprob - t["old_logprob"].double()).exp(), t["advantage"].double()
    objective = torch.minimum(ratio * a, torch.maximum(torch.minimum(ratio, high.double()), low.double()) * a)
    objective = torch.where(a < 0, torch.maximum(objective, dual_clip * a), objective) if dual_clip < 2 else objective
    objective = torch.where(t["mask"], objective * t["weight"].double(), 0.0)
    (gradient,) = torch.autograd.grad(objective.sum(), logprob)
    gate = torch.full((5001,), 77, dtype=torch.uint8)
    poisoned = [torch.where(t["mask"], bound, torch.nan) for bound in (low, high)]
    found = kernels.objective(
        t["logprob"], t["old_logprob"], t["advantage"], (poisoned[0], poisoned[1]),
        dual_clip=dual_clip, mask=t["mask"], weight=t["weight"], entropy=t["entropy"], gate=gate,
    )  # fmt: skip
    torch.testing.assert_close(found[0].double(), objective.detach(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(found[1].double(), gradient, rtol=1e-6, atol=1e-7)
    kept = t["mask"]
    expected = 1 * (kept & (a > 0) & (ratio > high)) + 2 * (kept & (a < 0) & (ratio < low))
    expected += 3 * (kept & (a < 0) & (ratio > dual_clip))
    assert torch.equal(gate.long(), expected)
    assert set(gate.tolist()) == ({0, 1, 2, 3} if dual_clip < 2 else {0, 1, 2})
    assert found[2][:2].tolist() == [int((gate == 1).sum()), int((gate == 2).sum())]


def test_thresholds_and_their_bounds_give_the_same(kernels: Kernels) -> None:
    t = tokens(3000, 9)
    old_prob, rest = t["old_logprob"].exp(), (t["logprob"], t["old_logprob"], t["advantage"])
    lower_intercept, lower_slope, upper_intercept, upper_slope = DYNAMIC
    low, high = (
        (1 - lower_intercept) / (1 + lower_slope * old_prob),
        (1 + upper_intercept) / (1 - upper_slope * old_prob),
    )
    for by_thresholds, by_bounds in zip(
        kernels.objective(*rest, DYNAMIC, dual_clip=1.5),
        kernels.objective(*rest, (low, high), dual_clip=1.5),
        strict=True,
    ):
        torch.testing.assert_close(by_thresholds, by_bounds, rtol=3e-7, atol=0)


def test_optional_inputs(kernels: Kernels) -> None:
    t = tokens(1000, 4)
    t["mask"], t["weight"] = torch.ones(1000, dtype=torch.bool), torch.ones(1000)
    objective, gradient, counts = exact(t, DYNAMIC)
    found = kernels.objective(t["logprob"], t["old_logprob"], t["advantage"], DYNAMIC)
    torch.testing.assert_close(found[0].double(), objective, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(found[1].double(), gradient, rtol=1e-6, atol=1e-7)
    assert found[2].tolist() == [*counts[:2], 0, 0, 0, 0]


def test_masked_tokens_and_zero_advantages_give_zero_whatever_they_hold(kernels: Kernels) -> None:
    poison = torch.tensor([torch.nan, torch.inf, -torch.inf, 500.0])
    zeros, ones = torch.zeros(4), torch.ones(4)
    masked = kernels.objective(poison, -ones, ones, DYNAMIC, mask=torch.zeros(4, dtype=torch.bool), entropy=poison)
    overflowing = kernels.objective(torch.full((4,), 500.0), -ones, zeros, DYNAMIC, entropy=ones)
    for objective, gradient, counts in (masked, overflowing):
        assert objective.tolist() == gradient.tolist() == zeros.tolist()
        assert counts.tolist() == [0] * 6


def test_an_overflowing_ratio_is_clipped(kernels: Kernels) -> None:
    objective, gradient, counts = kernels.objective(
        torch.tensor([0.0]), torch.tensor([-200.0]), torch.tensor([2.0]), DYNAMIC
    )
    assert objective.tolist() == [3.0] and gradient.tolist() == [0.0] and counts.tolist() == [1, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("dual_clip", [math.inf, 3.0])
def test_value_and_gradient_are_finite_and_exact_at_any_log_ratio(kernels: Kernels, dual_clip: float) -> None:
    """tests/unit/ops/test_extreme_ratios.py, for the CUDA kernel: saturated only where float32 holds no product."""
    largest = torch.finfo(torch.float32).max
    ratios = [s * x for x in (1e-3, 1.0, 87.0, 88.8, 100.0, 176.0, 1e4, 1e30, 3e38, math.inf) for s in (1, -1)]
    advantages = [s * x for x in (1.0, 1e-30, 3e-39, 1e30, 3e38) for s in (1, -1)]
    rows = [
        (min(x, 0) - 0.5, -max(x, 0) - 0.5, a, w) for x in ratios for a in advantages for w in (1.0, 0.0, 1e-25, 2.0)
    ]
    rows += [(-math.inf, -math.inf, a, 1.0) for a in advantages]
    logprob, old, advantage, weight = torch.tensor(rows).T.contiguous().unbind(0)
    found = kernels.objective(logprob, old, advantage, DYNAMIC, dual_clip=dual_clip, weight=weight)
    lower_intercept, lower_slope, upper_intercept, upper_slope = DYNAMIC
    old_prob, a = old.double().exp(), advantage.double()
    log_ratio = torch.where(logprob == old, 0.0, logprob.double() - old.double())
    ratio = log_ratio.exp().clamp(max=1e300)
    too_high = (a > 0) & (ratio > (high := (1 + upper_intercept) / (1 - upper_slope * old_prob)))
    too_low = (a < 0) & (ratio < (low := (1 - lower_intercept) / (1 + lower_slope * old_prob)))
    dual = (a < 0) & (ratio > dual_clip)
    factor = torch.where(too_high, high, torch.where(too_low, low, torch.where(dual, dual_clip, ratio)))
    objective = (factor * (a * weight.double())).clamp(-largest, largest)
    gradient = torch.where(too_high | too_low | dual, 0.0, objective)
    torch.testing.assert_close(found[0].double(), objective, rtol=1e-6, atol=3e-45)
    torch.testing.assert_close(found[1].double(), gradient, rtol=1e-6, atol=3e-45)


def test_nan_reaches_the_result(kernels: Kernels) -> None:
    nan, one = torch.tensor([torch.nan]), torch.tensor([1.0])
    for arguments in ((nan, -one, one), (-one, nan, one), (-one, -one, nan)):
        assert kernels.objective(*arguments, DYNAMIC)[0].isnan().all()


@pytest.mark.parametrize("order", [1, 2, 3])
def test_thread_order_changes_no_count(kernels: Kernels, order: int) -> None:
    t = tokens(20000, 5)
    arguments = (t["logprob"], t["old_logprob"], t["advantage"], DYNAMIC)
    expected = kernels.objective(*arguments, entropy=t["entropy"], multiprocessors=3)
    kernels.set_order(order)
    found = kernels.objective(*arguments, entropy=t["entropy"], multiprocessors=3)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_counts_are_added_to(kernels: Kernels) -> None:
    t = tokens(300, 6)
    arguments = (t["logprob"], t["old_logprob"], t["advantage"], DYNAMIC)
    fresh = kernels.objective(*arguments, entropy=t["entropy"])[2]
    added = kernels.objective(*arguments, entropy=t["entropy"], counts=torch.full((6,), 1000))[2]
    assert (added - 1000).tolist() == fresh.tolist()


def test_the_border_belongs_to_the_regions_of_unlikely_tokens(kernels: Kernels) -> None:
    """-ln p = H exactly, as in every row whose logits are equal: E2 where A > 0, E4 where A < 0, nothing else."""
    surprise = torch.tensor([0.5, 0.5, 0.5, 2.0])
    advantage = torch.tensor([1.0, -1.0, 0.0, 3.0])
    counts = kernels.objective(-surprise, -surprise, advantage, DYNAMIC, entropy=surprise)[2]
    assert counts.tolist() == [0, 0, 0, 2, 0, 1]
