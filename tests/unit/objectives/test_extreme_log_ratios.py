"""Every objective at any log-ratio: finite value and gradient, and the paper's formula where float32 holds it."""

import itertools
import math

import pytest
import torch

from megatron_rlvr.control import AffineThreshold, ClipThresholds
from megatron_rlvr.objectives import OBJECTIVES, TokenInputs, build_objective
from megatron_rlvr.objectives.importance_presets import PRESETS

LARGEST = torch.finfo(torch.float32).max
THRESHOLDS = ClipThresholds(AffineThreshold(0.3, -0.13), AffineThreshold(0.5, -0.25))
LOG_RATIOS = [0.0, *(s * x for x in (1e-2, 1.0, 88.0, 89.0, 100.0, 1e4, 1e30, 3e38, math.inf) for s in (1, -1))]
ADVANTAGES = [0.0, 1.0, -1.0, 1e-20, -1e-20, 1e30, -1e30]
EVERY = [(name, extra) for name in OBJECTIVES for extra in ({}, {"importance_cap": 5.0})]
EVERY += [(name, {"importance_cap": 5.0, "importance_level": "sequence"}) for name in ("clip", "gspo")]
EVERY += [(name, {"importance": text}) for text in PRESETS for name in ("clip", "cispo")]
EVERY += [
    ("cispo", {"clip_low": True}),
    ("ce-gppo", {"beta_low": 0.0, "beta_high": 1e5}),
    ("kl-cov", {"share": 0.99, "coefficient": 1e5}),
    ("clip-cov", {"share": 0.99, "lower": -1e5, "upper": 1e5}),
    ("dcpo", {"eps_low": 1e-30, "eps_high": 1e5, "max_ratio": 1e5}),
    ("clip", {"entropy_coefficient": 0.01}),
    ("dppo", {"divergence": "kl", "log_ratio_penalty": 1e5, "max_ratio": 1e5}),
    ("sapo", {"tau_positive": 1e-3, "tau_negative": 1e5}),
]


def inputs(seed, dtype, ordinary=8):
    """A few ordinary sequences of one token, and one sequence for every extreme token."""
    generator = torch.Generator().manual_seed(seed)
    rows = [(min(x, 0.0) - 0.5, -max(x, 0.0) - 0.5, a) for x, a in itertools.product(LOG_RATIOS, ADVANTAGES)]
    rows += [(-math.inf, -math.inf, a) for a in ADVANTAGES]
    rows += [(-0.5, -0.7, a) for a in torch.randn(ordinary, generator=generator).tolist()]
    logprob, old, advantage = torch.tensor(rows, dtype=torch.float32).to(dtype).T.contiguous().unbind(0)
    gap = torch.tensor([0.0, 200.0, -200.0, 1e30, -1e30, math.inf])[torch.arange(len(rows)) % 6]
    entropy = torch.rand(len(rows), generator=generator).to(dtype)
    return TokenInputs(
        logprob=logprob.clone().requires_grad_(),
        entropy=entropy,
        old_entropy=entropy,
        old_logprob=old,
        advantage=advantage,
        sequence_index=torch.arange(len(rows)),
        sequence_count=len(rows),
        thresholds=THRESHOLDS,
        rollout_logprob=torch.where(old == -gap, old, old - gap.to(dtype)),  # never -inf + inf
        weight=torch.rand(len(rows), generator=generator).mul(1.9).to(dtype),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("name", "extra"), EVERY)
def test_value_and_gradient_are_finite(name, extra, dtype):
    for seed in range(2):
        tokens = inputs(seed, dtype)
        tokens.weight = tokens.weight if seed else None
        objective = build_objective(name, **extra)(tokens).objective
        (gradient,) = torch.autograd.grad(objective, tokens.logprob, torch.full_like(objective, 1e-3))
        assert objective.isfinite().all()
        assert gradient.isfinite().all()
        assert gradient.count_nonzero() > 5


def formula(name, log_ratio, a, p_old, logprob):
    """(value, derivative) in float64, where r is one token's ratio and its whole sequence's; None for no bound."""
    ratio = math.exp(log_ratio) if log_ratio < 700 else math.inf
    low, high = THRESHOLDS.ratio_bounds(p_old)
    if name == "gspo":
        low, high = 1 - 3e-4, 1 + 4e-4
    if name == "dcpo":
        low = 0.5 + 0.5 * math.sqrt(max(1 - 4 * 0.16 / p_old, 0)) if p_old else 0.5
        high = min(0.5 + 0.5 * math.sqrt(1 + 4 * 0.2 / p_old), 10.0) if p_old else 10.0
    if name == "cispo":
        slope = min(ratio, high) * a
        return (slope * logprob if slope else 0.0), slope
    if a == 0:
        return 0.0, 0.0
    if a > 0 and ratio > high:
        return high * a, high * a if name == "ce-gppo" else 0.0
    if a < 0 and ratio < low:
        return (0.75 * low * a, 0.75 * low * a) if name == "ce-gppo" else (low * a, 0.0)
    if name == "dual-clip" and a < 0 and ratio > 3:
        return 3 * a, 0.0
    return min(ratio, 1e300) * a, min(ratio, 1e300) * a


@pytest.mark.parametrize("name", ["clip", "dual-clip", "dcpo", "ce-gppo", "gspo", "cispo"])
def test_the_formula_holds_wherever_float32_holds_it(name):
    tokens = inputs(0, torch.float32)
    tokens.weight = None
    objective = build_objective(name)(tokens).objective
    (gradient,) = torch.autograd.grad(objective.sum(), tokens.logprob)
    compared = 0
    for row, (x, y, a) in enumerate(
        zip(tokens.logprob.tolist(), tokens.old_logprob.tolist(), tokens.advantage.tolist(), strict=True)
    ):
        value, slope = formula(name, 0.0 if x == y else x - y, a, math.exp(y), x)
        for found, exact in ((objective[row].item(), value), (gradient[row].item(), slope)):
            exact = max(-LARGEST, min(LARGEST, exact))
            assert found == pytest.approx(exact, rel=2e-6, abs=1e-40), (x, y, a)
            compared += abs(exact) < LARGEST
    assert compared > 200
