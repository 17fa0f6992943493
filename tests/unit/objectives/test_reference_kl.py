"""KL to a reference: values and gradients against float64 autograd, expected gradients against exact divergences."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megatron_rlvr.control import ClipThresholds
from megatron_rlvr.objectives import ReferenceKL, TokenInputs, build_objective

COEFFICIENT = 0.3
FORMULAS = {"k1": lambda x: x, "k2": lambda x: x**2 / 2, "k3": lambda x: torch.exp(-x) - 1 + x}
IN_LOSS = [*itertools.product(FORMULAS, [True]), ("k2", False), ("k3", False)]


def tokens(logprob: Tensor, old: Tensor, reference: Tensor) -> TokenInputs:
    return TokenInputs(
        logprob=logprob,
        entropy=torch.zeros_like(old),
        old_logprob=old,
        advantage=torch.zeros_like(old),
        sequence_index=torch.zeros(len(old), dtype=torch.int64),
        sequence_count=1,
        thresholds=ClipThresholds(),
        reference_logprob=reference,
    )


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("estimator", "weighted"), IN_LOSS)
def test_value_and_gradient_are_those_of_the_formula(estimator: str, weighted: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logprob, old, reference = -torch.rand(3, 200, generator=generator, dtype=torch.float64).mul(4)
    logprob.requires_grad_()
    exact = logprob.detach().clone().requires_grad_()
    difference, ratio = exact - reference, (exact - old).exp()
    value = FORMULAS[estimator](difference)
    if not weighted:
        formula = value
    elif estimator == "k3":
        formula = ratio * value
    else:  # the value of the estimator with the gradient of k2 under a constant ratio
        surrogate = ratio.detach() * difference**2 / 2
        formula = (ratio * value).detach() + surrogate - surrogate.detach()
    (-COEFFICIENT * formula).sum().backward()

    penalty = ReferenceKL(COEFFICIENT, estimator, importance_weight=weighted)  # type: ignore[arg-type]
    objective = penalty.objective(tokens(logprob, old, reference))
    objective.sum().backward()
    assert objective.dtype == torch.float64
    torch.testing.assert_close(objective.detach(), -COEFFICIENT * formula.detach(), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(logprob.grad, exact.grad, rtol=1e-12, atol=1e-13)


def _expected_gradient(penalty: ReferenceKL, logits: Tensor, old: Tensor, reference: Tensor) -> Tensor:
    """The gradient over the logits, averaged exactly over every token with its probability under the old policy."""
    logits = logits.detach().clone().requires_grad_()
    objective = penalty.objective(tokens(logits.log_softmax(0), old, reference))
    (old.exp() * objective).sum().backward()
    assert logits.grad is not None
    return logits.grad


def _gradient(divergence: Tensor, logits: Tensor) -> Tensor:
    return -COEFFICIENT * torch.autograd.grad(divergence, logits)[0]


@pytest.mark.parametrize("seed", range(3))
def test_expected_gradients_are_those_of_the_divergences(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits, old_logits, reference_logits = torch.randn(3, 7, generator=generator, dtype=torch.float64)
    old, reference = old_logits.log_softmax(0), reference_logits.log_softmax(0)
    logits.requires_grad_()
    logprob = logits.log_softmax(0)
    reverse = _gradient((logprob.exp() * (logprob - reference)).sum(), logits)
    forward = _gradient((reference.exp() * (reference - logits.log_softmax(0))).sum(), logits)
    assert (reverse - forward).norm() > 0.1 * reverse.norm()
    on_policy = logprob.detach()

    def expected(estimator: str, weighted: bool, sampled: Tensor) -> Tensor:
        penalty = ReferenceKL(COEFFICIENT, estimator, importance_weight=weighted)  # type: ignore[arg-type]
        return _expected_gradient(penalty, logits, sampled, reference)

    for estimator, sampled in itertools.product(FORMULAS, (on_policy, old)):
        torch.testing.assert_close(expected(estimator, True, sampled), reverse, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(expected("k2", False, on_policy), reverse, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(expected("k3", False, on_policy), forward, rtol=1e-12, atol=1e-14)
    for estimator in ("k2", "k3"):  # off-policy, without weights, both are of neither
        assert (expected(estimator, False, old) - reverse).norm() > 0.05 * reverse.norm()

    # In the reward: the estimate is a constant that multiplies the gradient of the log-prob.
    def in_reward(estimator: str) -> Tensor:
        estimate = ReferenceKL(COEFFICIENT, estimator, "reward").estimate(on_policy, reference)  # type: ignore[arg-type]
        rewarded = (on_policy.exp() * -COEFFICIENT * estimate * logits.log_softmax(0)).sum()
        return torch.autograd.grad(rewarded, logits)[0]

    torch.testing.assert_close(in_reward("k1"), reverse, rtol=1e-12, atol=1e-14)
    assert all((in_reward(estimator) - reverse).norm() > 0.05 * reverse.norm() for estimator in ("k2", "k3"))


def test_k1_and_k3_are_unbiased_and_k3_varies_less() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(9, generator=generator, dtype=torch.float64)
    logprob = logits.log_softmax(0)
    reference = (logits + 0.1 * torch.randn(9, generator=generator, dtype=torch.float64)).log_softmax(0)
    prob = logprob.exp()
    exact = (prob * (logprob - reference)).sum()
    estimates = {name: ReferenceKL(1.0, name, "reward").estimate(logprob, reference) for name in FORMULAS}  # type: ignore[arg-type]
    mean = {name: float((prob * value).sum()) for name, value in estimates.items()}
    spread = {name: float((prob * (value - mean[name]) ** 2).sum()) for name, value in estimates.items()}
    assert mean["k1"] == pytest.approx(float(exact)) and mean["k3"] == pytest.approx(float(exact))
    assert mean["k2"] != pytest.approx(float(exact), rel=1e-3) and mean["k2"] == pytest.approx(float(exact), rel=0.2)
    assert spread["k3"] < 0.1 * spread["k1"]


@pytest.mark.parametrize(("estimator", "weighted"), IN_LOSS)
def test_any_log_ratio_has_a_finite_value_and_gradient(estimator: str, weighted: bool) -> None:
    gaps = [0.0, *(s * x for x in (1e-3, 1.0, 89.0, 1e4, 1e30, 3e38, math.inf) for s in (1, -1))]
    rows = [(-0.5 - max(x, 0), -0.5 - max(y, 0), -0.5 - max(z, 0)) for x, y, z in itertools.product(gaps, repeat=3)]
    logprob, old, reference = torch.tensor(rows).T.contiguous().unbind(0)
    logprob.requires_grad_()
    penalty = ReferenceKL(1e3, estimator, importance_weight=weighted)  # type: ignore[arg-type]
    objective = penalty.objective(tokens(logprob, old, reference))
    objective.backward(torch.full_like(objective, 1e-3))
    assert objective.isfinite().all() and logprob.grad is not None and logprob.grad.isfinite().all()
    assert logprob.grad.count_nonzero() > 100
    equal = logprob.detach() == reference
    assert (objective.detach()[equal] == 0).all() and (logprob.grad[equal] == 0).all()


def test_the_penalty_goes_with_any_objective_and_tokens_without_advantage_have_it() -> None:
    generator = torch.Generator().manual_seed(4)
    logprob, old, reference = -torch.rand(3, 50, generator=generator, dtype=torch.float64)
    inputs = replace(tokens(logprob.requires_grad_(), old, reference), weight=torch.full((50,), 2.0).double())
    inputs.advantage = torch.randn(50, generator=generator).double() * (torch.arange(50) % 2)
    penalty = ReferenceKL(COEFFICIENT)
    for name in ("clip", "gspo", "cispo"):
        plain, with_kl = build_objective(name), replace(build_objective(name), reference_kl=penalty)
        difference = with_kl(inputs).objective - plain(inputs).objective
        torch.testing.assert_close(difference, penalty.objective(inputs))
        assert plain.ignores_zero_advantage and not with_kl.ignores_zero_advantage and not with_kl.is_plain_clip
    in_reward = replace(build_objective("clip"), reference_kl=ReferenceKL(COEFFICIENT, "k1", "reward"))
    assert in_reward.is_plain_clip and in_reward.ignores_zero_advantage
    assert in_reward(inputs).objective.equal(build_objective("clip")(inputs).objective)
    with pytest.raises(ValueError, match="reference_logprob is None"):
        replace(build_objective("clip"), reference_kl=penalty)(replace(inputs, reference_logprob=None))


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(ValueError, match="kl_estimator=k1 in the loss with kl_importance_weight=false"):
        ReferenceKL(0.1, "k1", "loss", importance_weight=False)
    with pytest.raises(ValueError, match="kl_estimator: unknown 'k4'; valid: k1, k2, k3"):
        ReferenceKL(0.1, "k4")  # type: ignore[arg-type]
    assert ReferenceKL(0.1).chosen == "k3" and ReferenceKL(0.1, place="reward").chosen == "k1"
