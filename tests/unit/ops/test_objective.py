"""The objectives compared with their definition in float64, with the thresholds taken at the current probability."""

from dataclasses import dataclass

import pytest
import torch

from megatron_rlvr import ops
from megatron_rlvr.control import AffineThreshold, ClipThresholds


@dataclass
class Affine:
    intercept: float = 0.2
    slope: float = 0.0

    def __call__(self, p):
        return self.intercept + self.slope * p


@dataclass
class Thresholds:
    upper: Affine
    lower: Affine


STATIC = Thresholds(Affine(), Affine())
PAPER = Thresholds(Affine(0.5, -0.25), Affine(0.3, -0.13))
STEEP = Thresholds(Affine(3.0, -2.8), Affine(0.3, 0.4))


def make(tokens, seed):
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    old = -torch.rand(tokens, generator=generator) * 4
    logprob = (old + 0.4 * torch.randn(tokens, generator=generator)).clamp(max=0)
    advantage = torch.randn(tokens, generator=generator)
    advantage[::7] = 0
    entropy = torch.rand(tokens, generator=generator) * 4
    return logprob, old, advantage, entropy


@pytest.mark.parametrize("thresholds", [STATIC, PAPER, STEEP])
@pytest.mark.parametrize("seed", [0, 1])
def test_against_definition(thresholds, seed):
    logprob, old, advantage, entropy = make(5000, seed)
    weight = torch.rand(5000) + 0.5
    lp, A, H = logprob.double().requires_grad_(), advantage.double(), entropy.double()
    p, r = lp.detach().exp(), (lp - old.double()).exp()
    # The gate as in the paper, at the current probability; the kernel uses the closed form.
    clip_high = (A > 0) & (r > 1 + thresholds.upper(p))
    clip_low = (A < 0) & (r < 1 - thresholds.lower(p))
    gate = ~clip_high & ~clip_low
    leaf = logprob.clone().requires_grad_()
    found = ops.clipped_objective(leaf, old, advantage, thresholds, weight=weight, entropy=entropy)
    expected = (r * A * weight.double())[gate]
    torch.testing.assert_close(found.objective.double()[gate], expected, rtol=1e-6, atol=1e-9)
    old_prob = old.double().exp()
    high = (1 + thresholds.upper.intercept) / (1 - thresholds.upper.slope * old_prob)
    low = (1 - thresholds.lower.intercept) / (1 + thresholds.lower.slope * old_prob)
    expected = torch.minimum(r * A, r.clamp(low, high) * A) * weight.double()
    torch.testing.assert_close(found.objective.double(), expected, rtol=1e-6, atol=1e-9)
    (gradient,) = torch.autograd.grad(expected.sum(), lp)
    found.objective.sum().backward()
    torch.testing.assert_close(leaf.grad.double(), gradient, rtol=1e-6, atol=1e-9)
    assert found.clip_high.item() == clip_high.sum().item() > 0
    assert found.clip_low.item() == clip_low.sum().item() > 0
    assert found.clip_high.dim() == 0
    surprise = -lp
    regions = [
        (A > 0) & (surprise < H),
        (A > 0) & (surprise >= H),
        (A < 0) & (surprise < H),
        (A < 0) & (surprise >= H),
    ]
    assert found.region_counts.tolist() == [int(region.sum()) for region in regions]


def make_bounds(tokens, seed):
    generator = torch.Generator(torch.get_default_device()).manual_seed(100 + seed)
    low = 0.5 + 0.5 * torch.rand(tokens, generator=generator)
    return low, 1 + torch.rand(tokens, generator=generator)


@pytest.mark.parametrize("dual_clip", [None, 1.3])
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bounds_per_token_against_definition(dual_clip, seed, dtype):
    logprob, old, advantage, entropy = (t.to(dtype) for t in make(5000, seed))
    low, high = (b.to(dtype) for b in make_bounds(5000, seed))
    weight, mask = torch.rand(5000, dtype=dtype) + 0.5, torch.rand(5000) > 0.1
    lp, A = logprob.double().requires_grad_(), advantage.double()
    r = (lp - old.double()).exp()
    expected = torch.minimum(r * A, torch.maximum(torch.minimum(r, high.double()), low.double()) * A)
    if dual_clip is not None:
        expected = torch.where(A < 0, torch.maximum(expected, dual_clip * A), expected)
    expected = torch.where(mask, expected * weight.double(), 0.0)
    (gradient,) = torch.autograd.grad(expected.sum(), lp)
    leaf = logprob.detach().clone().requires_grad_()
    found = ops.bounded_objective(
        leaf, old, advantage, low, high, dual_clip=dual_clip, mask=mask, weight=weight, entropy=entropy
    )
    found.objective.sum().backward()
    rtol, atol = (1e-6, 1e-9) if dtype == torch.float32 else (1e-13, 1e-15)
    torch.testing.assert_close(found.objective.double(), expected.detach(), rtol=rtol, atol=atol)
    torch.testing.assert_close(leaf.grad.double(), gradient, rtol=rtol, atol=atol)
    is_high, is_low = mask & (A > 0) & (r > high.double()), mask & (A < 0) & (r < low.double())
    is_dual = mask & (A < 0) & (r > (dual_clip or torch.inf))
    assert torch.equal(found.is_clipped_high, is_high) and torch.equal(found.is_clipped_low, is_low)
    assert torch.equal(found.gate == 3, is_dual)
    assert torch.equal(found.gate == 0, ~(is_high | is_low | is_dual))
    assert found.clip_high.item() == is_high.sum().item() > 0
    assert found.clip_low.item() == is_low.sum().item() > 0
    assert is_dual.any() == (dual_clip is not None)
    in_region = mask & (A != 0)
    assert found.region_counts.sum() == in_region.sum()


@pytest.mark.parametrize("thresholds", [STATIC, PAPER, STEEP])
@pytest.mark.parametrize("dual_clip", [None, 1.2])
def test_thresholds_are_the_bounds_that_control_computes(thresholds, dual_clip):
    """The operators apply the bounds of control.ClipThresholds.ratio_bounds, also at a huge and at a tiny ratio."""
    logprob, old, advantage, _ = make(2000, 0)
    logprob[:500], logprob[500:1000] = 30.0, -60.0
    upper, lower = thresholds.upper, thresholds.lower
    public = ClipThresholds(
        AffineThreshold(lower.intercept, lower.slope), AffineThreshold(upper.intercept, upper.slope)
    )
    low, high = public.ratio_bounds(old.exp())
    by_thresholds = ops.clipped_objective(logprob, old, advantage, public, dual_clip=dual_clip)
    by_bounds = ops.bounded_objective(logprob, old, advantage, low, high, dual_clip=dual_clip)
    torch.testing.assert_close(by_thresholds.objective, by_bounds.objective, rtol=3e-7, atol=0)
    assert torch.equal(by_thresholds.gate, by_bounds.gate)


def test_one_number_bounds_all_tokens():
    logprob, old, advantage, _ = make(500, 0)
    expected = ops.clipped_objective(logprob, old, advantage, STATIC)
    found = ops.bounded_objective(logprob, old, advantage, 0.8, 1.2)
    assert torch.equal(found.objective, expected.objective) and torch.equal(found.gate, expected.gate)


@pytest.mark.parametrize("dual_clip", [None, 1.2])
def test_gradcheck_in_float64(dual_clip):
    logprob, old, advantage, _ = (t.double() for t in make(60, 2))
    low, high = (b.double() for b in make_bounds(60, 2))
    leaf = logprob.requires_grad_()
    for objective in (
        lambda x: ops.clipped_objective(x, old, advantage, PAPER, dual_clip=dual_clip).objective,
        lambda x: ops.bounded_objective(x, old, advantage, low, high, dual_clip=dual_clip).objective,
    ):
        assert torch.autograd.gradcheck(objective, leaf)
        assert torch.autograd.gradgradcheck(objective, leaf)


def test_no_gradient_reaches_the_bounds():
    logprob, old, advantage, _ = make(50, 0)
    low, high = (b.requires_grad_() for b in make_bounds(50, 0))
    found = ops.bounded_objective(logprob.requires_grad_(), old, advantage, low, high)
    found.objective.sum().backward()
    assert low.grad is None and high.grad is None


def test_masked_tokens_count_nowhere_whatever_they_hold():
    logprob, old, advantage, entropy = make(100, 0)
    mask = torch.arange(100) % 3 > 0
    clean = ops.clipped_objective(logprob[mask], old[mask], advantage[mask], PAPER, entropy=entropy[mask])
    for tensor in (logprob, old, advantage, entropy):
        tensor[~mask] = torch.nan
    leaf = logprob.clone().requires_grad_()
    found = ops.clipped_objective(leaf, old, advantage, PAPER, mask=mask, entropy=entropy)
    found.objective.sum().backward()
    assert torch.equal(found.objective[mask], clean.objective)
    assert found.objective[~mask].abs().max() == 0
    assert leaf.grad[~mask].abs().max() == 0
    assert (found.clip_high, found.clip_low) == (clean.clip_high, clean.clip_low)
    assert torch.equal(found.region_counts, clean.region_counts)


def test_no_advantage_gives_zero_even_where_the_ratio_overflows():
    logprob = torch.tensor([0.0, -1.0])
    found = ops.clipped_objective(logprob, torch.tensor([-200.0, -1.0]), torch.zeros(2), PAPER)
    assert found.objective.tolist() == [0.0, 0.0]


def test_old_logprob_of_minus_infinity():
    found = ops.clipped_objective(torch.tensor([-1.0]), torch.tensor([-torch.inf]), torch.tensor([2.0]), STATIC)
    torch.testing.assert_close(found.objective, torch.tensor([2.4]))


def test_higher_derivatives_are_exact():
    logprob, old, advantage, _ = make(200, 0)
    weight = torch.rand(200) + 0.5
    leaf, exact = logprob.clone().requires_grad_(), logprob.double().requires_grad_()
    ratio = (exact - old.double()).exp()
    expected = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage) * weight.double()
    found = ops.clipped_objective(leaf, old, advantage, STATIC, weight=weight).objective
    for order in (1, 2, 3):  # of the square, so that every term of the product rule counts
        (mine,) = torch.autograd.grad(found.square().sum(), leaf, create_graph=True)
        (reference,) = torch.autograd.grad(expected.square().sum(), exact, create_graph=True)
        torch.testing.assert_close(mine.double(), reference, rtol=1e-5, atol=1e-6, msg=f"order {order}")
        found, expected = mine, reference


@pytest.mark.parametrize(
    ("upper", "lower", "message"),
    [
        (Affine(0.5, 1.0), Affine(), "the upper slope must be a number below 1, found 1.0"),
        (Affine(), Affine(0.3, -1.5), "the lower slope must be a number above -1, found -1.5"),
        (Affine(torch.nan), Affine(), "the intercepts must be numbers, found nan and 0.2"),
        (Affine(0.2, torch.nan), Affine(), "the upper slope must be a number below 1, found nan"),
    ],
)
def test_thresholds_whose_bounds_do_not_exist_are_refused(upper, lower, message):
    with pytest.raises(ValueError, match=message):
        ops.clipped_objective(torch.zeros(3), torch.zeros(3), torch.ones(3), Thresholds(upper, lower))


def test_infinite_intercepts_turn_clipping_off():
    logprob, old, advantage, _ = make(500, 0)
    found = ops.clipped_objective(logprob, old, advantage, Thresholds(Affine(torch.inf), Affine(torch.inf)))
    torch.testing.assert_close(found.objective, (logprob - old).exp() * advantage)
    assert found.clip_high == found.clip_low == 0


def test_without_entropy_there_are_no_regions():
    logprob, old, advantage, _ = make(10, 0)
    assert ops.clipped_objective(logprob, old, advantage, PAPER).region_counts is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logprob": torch.zeros(3, 1)}, r"logprob: must be float32 \[T\], found torch.float32 \[3, 1\]"),
        (
            {"old_logprob": torch.zeros(3, dtype=torch.float64)},
            "old_logprob: must be torch.float32, found torch.float64",
        ),
        ({"advantage": torch.zeros(4)}, r"advantage: must be \[T\] with T = 3 tokens, found \[4\]"),
        ({"mask": torch.zeros(3)}, "mask: must be torch.bool, found torch.float32"),
        ({"weight": torch.zeros(3, device="meta")}, "weight: must be on the device of log-probs, .*, found meta"),
    ],
)
def test_bad_arguments(change, message, placed):
    arguments = {"logprob": torch.zeros(3), "old_logprob": torch.zeros(3), "advantage": torch.zeros(3)}
    arguments |= placed(change)
    keywords = {name: arguments.pop(name) for name in ("mask", "weight") if name in arguments}
    with pytest.raises(ValueError, match=message):
        ops.clipped_objective(*arguments.values(), PAPER, **keywords)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"low": torch.zeros(4)}, r"low: must be \[T\] with T = 3 tokens, found \[4\]"),
        ({"high": torch.zeros(3, dtype=torch.float64)}, "high: must be torch.float32, found torch.float64"),
        ({"dual_clip": 1.0}, "dual_clip: must exceed 1, found 1.0"),
    ],
)
def test_bad_bounds(change, message, placed):
    arguments = {"low": torch.zeros(3), "high": torch.ones(3)} | placed(change)
    with pytest.raises(ValueError, match=message):
        ops.bounded_objective(torch.zeros(3), torch.zeros(3), torch.zeros(3), **arguments)


def test_strided_tensors():
    logprob, old, advantage, _ = make(40, 0)
    expected = ops.clipped_objective(logprob[::2].clone(), old[::2].clone(), advantage[::2].clone(), PAPER)
    found = ops.clipped_objective(logprob[::2], old[::2], advantage[::2], PAPER)
    assert torch.equal(found.objective, expected.objective)
