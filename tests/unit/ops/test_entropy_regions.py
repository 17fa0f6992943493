"""Every implementation of the entropy regions, and the sign of the change that the regions stand for, in float64."""

import pytest
import torch

from megatron_rlvr import ops
from megatron_rlvr.control.regions import classify, entropy_change
from megatron_rlvr.ops import reference

SCALARS = (-0.25, 0.5, -0.13, 0.3)


def by_control(logprob, entropy, advantage):
    region = classify(logprob, entropy, advantage)
    return [int((region == number).sum()) for number in (1, 2, 3, 4)]


def by_reference(logprob, entropy, advantage):
    return reference.clipped_objective(logprob, logprob, advantage, None, None, entropy, *SCALARS)[2][2:].tolist()


def by_kernel(logprob, entropy, advantage):
    counts = torch.ops.megatron_rlvr.clipped_objective(logprob, logprob, advantage, None, None, entropy, *SCALARS)[2]
    return counts[2:].tolist()


IMPLEMENTATIONS = [by_control, by_reference, by_kernel]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("surprise", "entropy", "advantage", "region"),
    [
        (0.1, 1.0, 1.0, 1),
        (3.0, 1.0, 2.0, 2),
        (0.1, 1.0, -1.0, 3),
        (3.0, 1.0, -0.5, 4),
        (1.0, 1.0, 1.0, 2),  # the border
        (1.0, 1.0, -1.0, 4),
        (0.0, 0.0, 1.0, 2),  # the border of a token that is certain
        (0.0, 0.0, -1.0, 4),
        (1.0, 1.0, 0.0, 0),
        (3.0, 1.0, 0.0, 0),
        (torch.nan, 1.0, 1.0, 0),
        (1.0, torch.nan, -1.0, 0),
        (1.0, 2.0, torch.nan, 0),
    ],
)
def test_every_implementation_draws_the_same_border(implementation, surprise, entropy, advantage, region):
    counts = implementation(-torch.tensor([surprise]), torch.tensor([entropy]), torch.tensor([advantage]))
    assert counts == [int(number == region) for number in (1, 2, 3, 4)]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("vocabulary", [1, 2, 7, 1000, 50257])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_uniform_distribution_lies_on_the_border(implementation, vocabulary, dtype):
    """Log-prob and entropy of equal logits are the same float32 number, so the border is met exactly."""
    logits = torch.full((4, vocabulary), 3.5, dtype=dtype)
    found = ops.token_statistics(logits, torch.arange(4) % vocabulary, temperature=0.7)
    assert torch.equal(-found.logprob, found.entropy)
    advantage = torch.tensor([1.0, 2.0, -1.0, 0.0])
    assert implementation(found.logprob, found.entropy, advantage) == [0, 2, 0, 1]


def token_on_the_border():
    """Float64 logits [9] of a distribution that is not uniform, with -ln p_0 = H."""
    rest = torch.linspace(-3, 3, 8, dtype=torch.float64)
    low, high = -10.0, 10.0
    for _ in range(200):
        middle = (low + high) / 2
        logp = torch.cat([torch.tensor([middle], dtype=torch.float64), rest]).log_softmax(0)
        entropy = -(logp.exp() * logp).sum()
        low, high = (middle, high) if -logp[0] > entropy else (low, middle)
    return torch.cat([torch.tensor([middle], dtype=torch.float64), rest])


@pytest.mark.parametrize(("advantage", "region"), [(1.0, 2), (-1.0, 4)])
def test_on_the_border_e2_raises_entropy_and_e4_lowers_it(advantage, region):
    """Checked with autograd: the token's own term is 0 there, and the vocabulary baseline gives the sign."""
    logits = token_on_the_border().requires_grad_()
    logp = logits.log_softmax(0)
    entropy = -(logp.exp() * logp).sum()
    assert (logp[0] + entropy).abs() < 1e-14
    (ascent,) = torch.autograd.grad(advantage * logp[0], logits, retain_graph=True)
    (entropy_gradient,) = torch.autograd.grad(entropy, logits, retain_graph=True)
    change = (ascent * entropy_gradient).sum()
    squared = logp.detach().exp().square()
    formula = entropy_change(logp[0], entropy, torch.tensor(advantage), squared.sum(), (squared * logp).sum())
    torch.testing.assert_close(formula.detach(), change, atol=1e-15, rtol=1e-12)
    assert change * advantage > 0.01
    on_border = classify(-entropy.detach().reshape(1), entropy.detach().reshape(1), torch.tensor([advantage]))
    assert on_border.tolist() == [region]
