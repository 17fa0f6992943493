"""Thresholds as operators accept them: objects and numbers, and steering, which is applied or refused."""

import pytest
import torch
from test_objective import make

from megatron_rlvr import ops
from megatron_rlvr.control import AffineThreshold, ClipThresholds

STEERED = ClipThresholds(0.2, 0.28, steering=-0.3)


def objective(thresholds, **settings):
    logprob, old, advantage, _ = make(200, 0)
    return ops.clipped_objective(logprob, old, advantage, thresholds, **settings).objective


def fused(thresholds, **settings):
    _, old, advantage, _ = make(200, 0)
    hidden, weight = torch.randn(200, 6), torch.randn(19, 6)
    return ops.fused_linear_objective(hidden, weight, torch.arange(200) % 19, old, advantage, thresholds, **settings)


@pytest.mark.parametrize(
    ("accepted", "bounds"),
    [
        (0.2, (0.8, 1.2)),
        (1, (0.0, 2.0)),
        ((0.2, 0.28), (0.8, 1.28)),
        ([0.2, torch.inf], (0.8, torch.inf)),
        (ClipThresholds.static(), (0.8, 1.2)),
        (ClipThresholds.static(0.1), (0.9, 1.1)),
        (ClipThresholds.static(0.2, 0.28), (0.8, 1.28)),
        (ClipThresholds(lower=0.2, upper=AffineThreshold(0.28)), (0.8, 1.28)),
    ],
)
def test_numbers_are_bounds(accepted, bounds):
    logprob, old, advantage, _ = make(200, 0)
    expected = ops.bounded_objective(logprob, old, advantage, *bounds).objective
    torch.testing.assert_close(objective(accepted), expected)


@pytest.mark.parametrize(
    "bad", [0.0, -0.1, True, (0.2,), (0.2, 0.2, 0.2), (0.8, None), (torch.nan, 0.2), "0.2", None, {"lower": 0.2}]
)
def test_what_is_no_threshold_is_refused_with_an_example(bad):
    with pytest.raises(ValueError, match=r"thresholds: .*0\.2|thresholds: must be a number, a pair"):
        objective(bad)


@pytest.mark.parametrize(("operator", "weight"), [(objective, "weight"), (fused, "token_weight")])
def test_steering_without_its_weights_is_refused_and_not_dropped(operator, weight):
    message = r"steering is -0\.3, .* pass steering_weight=.*StepTokens, or thresholds\.without_steering\(\)"
    for settings in ({}, {weight: torch.ones(200)}):
        with pytest.raises(ValueError, match=message):
            operator(STEERED, **settings)
    operator(STEERED.without_steering())
    operator(STEERED, steering_weight=torch.ones(200))


def test_steering_weights_multiply_the_objective():
    steering, weight = 0.5 + torch.rand(200), torch.rand(200)
    plain = objective(STEERED.without_steering())
    torch.testing.assert_close(objective(STEERED, steering_weight=steering), plain * steering)
    torch.testing.assert_close(objective(STEERED, steering_weight=steering, weight=weight), plain * steering * weight)
    with pytest.raises(ValueError, match=r"steering_weight: must be \[T\]"):
        objective(STEERED, steering_weight=steering[:3])


def test_the_fused_form_steers_the_objective_and_not_the_entropy_term():
    hidden, output = torch.randn(50, 6), torch.randn(19, 6)
    _, old, advantage, _ = make(50, 1)
    targets = torch.arange(50) % 19
    steering, weight = 0.5 + torch.rand(50), torch.rand(50)
    leaves = [tensor.clone().requires_grad_() for tensor in (hidden, output)]
    found = ops.fused_linear_objective(
        *leaves,
        targets,
        old,
        advantage,
        STEERED,
        token_weight=weight,
        steering_weight=steering,
        entropy_coefficient=0.1,
        chunk_bytes=1000,
    )
    found.loss.backward()
    expected = [tensor.clone().requires_grad_() for tensor in (hidden, output)]
    statistics = ops.token_statistics(expected[0] @ expected[1].T, targets)
    plain = ops.clipped_objective(statistics.logprob, old, advantage, STEERED, steering_weight=steering).objective
    loss = -(weight * (plain + 0.1 * statistics.entropy)).sum()
    loss.backward()
    torch.testing.assert_close(found.loss, loss.detach())
    torch.testing.assert_close(found.objective, plain.detach())
    for leaf, other in zip(leaves, expected, strict=True):
        torch.testing.assert_close(leaf.grad, other.grad, rtol=1e-4, atol=1e-6)
