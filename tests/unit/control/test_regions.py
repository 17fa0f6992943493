"""Regions and the first-order entropy change, compared with autograd in float64."""

import pytest
import torch

from megatron_rlvr.control import SteeringResponse
from megatron_rlvr.control.regions import (
    classify,
    disagrees,
    entropy_change,
    gradient_norm,
    steering_sums,
    steering_weights,
)


def policy(seed, tokens=400, vocabulary=7, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(tokens, vocabulary, generator=generator, dtype=torch.float64) * scale
    action = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
    advantage = torch.randn(tokens, generator=generator, dtype=torch.float64)
    logprobs = logits.log_softmax(-1)
    probs = logprobs.exp()
    return {
        "logits": logits,
        "action": action,
        "advantage": advantage,
        "logprob": logprobs.gather(1, action[:, None])[:, 0],
        "entropy": -(probs * logprobs).sum(-1),
        "sum_squared_prob": (probs**2).sum(-1),
        "sum_squared_prob_logprob": (probs**2 * logprobs).sum(-1),
    }


@pytest.mark.parametrize("seed", range(5))
def test_entropy_change_is_the_inner_product_of_the_two_gradients(seed):
    p = policy(seed)
    old_logprob = p["logprob"] + 0.3 * torch.randn_like(p["logprob"])
    logits = p["logits"].clone().requires_grad_()
    logprobs = logits.log_softmax(-1)
    ratio = (logprobs.gather(1, p["action"][:, None])[:, 0] - old_logprob).exp()
    (ascent,) = torch.autograd.grad((ratio * p["advantage"]).sum(), logits, retain_graph=True)
    (entropy_gradient,) = torch.autograd.grad(-(logprobs.exp() * logprobs).sum(), logits)
    expected = (ascent * entropy_gradient).sum(-1)
    names = ("logprob", "entropy", "advantage", "sum_squared_prob", "sum_squared_prob_logprob")
    arguments = [p[name] for name in names]
    torch.testing.assert_close(entropy_change(*arguments, old_logprob=old_logprob), expected, atol=1e-12, rtol=1e-10)
    # Without an old log-probability the ratio is 1.
    torch.testing.assert_close(entropy_change(*arguments, old_logprob=p["logprob"]), entropy_change(*arguments))


def test_entropy_change_predicts_a_small_finite_step():
    p = policy(3)
    change = entropy_change(
        p["logprob"], p["entropy"], p["advantage"], p["sum_squared_prob"], p["sum_squared_prob_logprob"]
    )
    rate = 1e-5
    gradient = torch.nn.functional.one_hot(p["action"], 7).double() - p["logits"].softmax(-1)
    moved = (p["logits"] + rate * p["advantage"][:, None] * gradient).log_softmax(-1)
    measured = -(moved.exp() * moved).sum(-1) - p["entropy"]
    torch.testing.assert_close(measured, rate * change, atol=1e-9, rtol=1e-3)


def test_classify_names_the_four_quadrants():
    logprob = torch.tensor([-0.1, -3.0, -0.1, -3.0, -1.0, -1.0, -3.0])
    entropy = torch.ones(7)
    advantage = torch.tensor([1.0, 2.0, -1.0, -0.5, 1.0, -1.0, 0.0])
    assert classify(logprob, entropy, advantage).tolist() == [1, 2, 3, 4, 2, 4, 0]


@pytest.mark.parametrize("seed", range(3))
def test_without_the_vocabulary_baseline_the_region_is_the_sign_of_the_change(seed):
    """E2 and E3 raise, E1 and E4 lower: exact for the token's own term -A p_a (ln p_a + H)."""
    p = policy(seed)
    zero = torch.zeros_like(p["logprob"])
    change = entropy_change(p["logprob"], p["entropy"], p["advantage"], zero, zero)
    region = classify(p["logprob"], p["entropy"], p["advantage"])
    raises = (region == 2) | (region == 3)
    assert torch.equal(change > 0, raises)
    assert {1, 2, 3, 4} == set(region.tolist())


@pytest.mark.parametrize("seed", range(5))
def test_only_likely_tokens_disagree_with_their_region(seed):
    p = policy(seed, vocabulary=50, scale=1.0)
    arguments = [p[name] for name in ("logprob", "entropy", "advantage")]
    region = classify(*arguments)
    change = entropy_change(*arguments, p["sum_squared_prob"], p["sum_squared_prob_logprob"])
    found = disagrees(region, change).tolist()
    effect = {1: -1, 2: 1, 3: 1, 4: -1}
    pairs = list(zip(region.tolist(), change.tolist(), strict=True))
    assert found == [c * effect[r] < 0 for r, c in pairs]
    assert {r for (r, _), differs in zip(pairs, found, strict=True) if differs} == {1, 3}


@pytest.mark.parametrize("seed", range(3))
def test_the_ascent_is_the_squared_logit_gradient(seed):
    p = policy(seed)
    logits = p["logits"].clone().requires_grad_()
    logprob = logits.log_softmax(-1).gather(1, p["action"][:, None])[:, 0]
    (gradient,) = torch.autograd.grad((logprob * p["advantage"]).sum(), logits)
    got = gradient_norm(p["logprob"], p["advantage"], p["sum_squared_prob"])
    torch.testing.assert_close(got, gradient.square().sum(-1), atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("steering", [-0.9, -0.3, 0.0, 0.5, 0.9])
def test_steering_weights_keep_the_ascent_and_change_entropy_as_predicted(steering):
    p = policy(5)
    names = ("logprob", "entropy", "advantage", "sum_squared_prob", "sum_squared_prob_logprob")
    change = entropy_change(*[p[name] for name in names])
    ascent = gradient_norm(p["logprob"], p["advantage"], p["sum_squared_prob"])
    token_weight = torch.rand(len(change), dtype=torch.float64)
    # The sums are additive: those of two ranks add up to those of all tokens.
    parts = [slice(0, 150), slice(150, None)]
    sums = sum(steering_sums(change[part], ascent[part], token_weight[part]) for part in parts)
    response = SteeringResponse.from_sums(sums.tolist())
    weight = steering_weights(change, steering, response)
    assert (weight > 0).all()
    assert (token_weight * ascent * weight).sum().item() == pytest.approx((token_weight * ascent).sum().item())
    assert (token_weight * change * weight).sum().item() == pytest.approx(response.predicted(steering))
    # Tokens that raise entropy gain weight against those that lower it exactly when u > 0.
    ratio = weight[change > 0].mean() / weight[change < 0].mean()
    assert ratio.item() == pytest.approx((1 + steering) / (1 - steering))
    # And drive and steering are each other's inverse.
    assert response.steering_for(response.drive(steering), 0.95) == pytest.approx(steering)


def test_steering_for_an_unreachable_drive_is_the_limit():
    response = SteeringResponse(change=-0.3, slope=1.0, ascent=2.0, ascent_slope=-0.4)
    assert response.steering_for(10.0, 0.9) == 0.9
    assert response.steering_for(-10.0, 0.9) == -0.9
    assert response.steering_for(0.1, 0.0) == 0.0
    assert SteeringResponse(0.0, 0.0, 0.0, 0.0).steering_for(0.5, 0.9) == 0.0
