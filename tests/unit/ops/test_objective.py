"""clipped_objective against the definition in float64, written with the thresholds at the current probability."""

from dataclasses import dataclass

import pytest
import torch

from megatron_rlvr import ops


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
    # the gate as the paper states it, at the current probability, not in the closed form that the kernel uses
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


def test_infinite_intercepts_are_no_clip():
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


def test_strided_tensors():
    logprob, old, advantage, _ = make(40, 0)
    expected = ops.clipped_objective(logprob[::2].clone(), old[::2].clone(), advantage[::2].clone(), PAPER)
    found = ops.clipped_objective(logprob[::2], old[::2], advantage[::2], PAPER)
    assert torch.equal(found.objective, expected.objective)
