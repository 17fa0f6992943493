"""KL to a reference policy, estimated from sampled tokens, as a term of the loss or of the reward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from megatron_rlvr.objectives.tokens import TokenInputs, log_ratio_of, saturated, zero_with_gradient

KLEstimator = Literal["k1", "k2", "k3"]
KLPlace = Literal["loss", "reward"]
LARGEST_LOG_RATIO = 300.0
"""Probability ratios are cut at e^300: they and their product with any log-ratio fit float64."""


def kl_estimate(estimator: str, logprob: Tensor, reference_logprob: Tensor) -> Tensor:
    """Estimate KL(pi, pi_ref) from each token, drawn from pi: float64 [T] in nats, detached.

    With l = ln pi - ln pi_ref of the token:

    - ``k1`` = l: unbiased, of either sign.
    - ``k2`` = l^2 / 2: biased by O(l^3), never negative.
    - ``k3`` = exp(-l) - 1 + l: unbiased, never negative.

    Source: J. Schulman, "Approximating KL Divergence", 2020 (joschu.net/blog/kl-approx.html).
    """
    log_ratio = log_ratio_of(logprob, reference_logprob).double()
    if estimator == "k1":
        return log_ratio
    if estimator == "k2":
        return log_ratio.square() / 2
    return torch.expm1((-log_ratio).clamp(max=LARGEST_LOG_RATIO)) + log_ratio


@dataclass(frozen=True)
class ReferenceKL:
    """A penalty ``coefficient`` * KL(pi, pi_ref), estimated from the sampled tokens.

    A policy is trained by the gradient of an estimator, not by its value. With l = ln pi - ln pi_ref and the ratio
    r = pi / pi_old, where pi_old sampled the tokens:

    ======  ========  ======  ====================  ====================================================
    place   estimate  weight  gradient per token    expected gradient
    ======  ========  ======  ====================  ====================================================
    reward  k1                l grad ln pi          of KL(pi, pi_ref), later tokens included
    reward  k2, k3            k grad ln pi          of no divergence: the gradient of k itself is left out
    loss    any       r       r l grad ln pi        of KL(pi, pi_ref) of each token
    loss    k1        none    grad ln pi            0: refused
    loss    k2        none    l grad ln pi          of KL(pi, pi_ref), at r = 1 alone
    loss    k3        none    (1 - e^-l) grad ln pi of KL(pi_ref, pi), the other direction, at r = 1 alone; equal to
                                                    first order in l
    ======  ========  ======  ====================  ====================================================

    k3 in the loss without weights is the penalty of GRPO (arXiv 2402.03300, equation 4), and with weights that of
    DeepSeek-V3.2 (arXiv 2512.02556, section 3.1), which differentiates the ratio as well: for r k3 the result is
    exactly r l grad ln pi. k1 and k2 get that gradient, too. In the loss a token answers for its own KL and not for
    that of the tokens after it; in the reward it answers for the whole sequence. Gradients of the estimators: Tang and
    Munos, arXiv 2506.09477.

    Args:
        coefficient: weight of the penalty, greater than 0.
        estimator: see :func:`kl_estimate`; None is ``k3`` in the loss and ``k1`` in the reward.
        place: ``loss``: subtracted from the objective of every token; ``reward``: the sum over a sequence's tokens is
            subtracted from its reward.
        importance_weight: weigh the tokens of the loss by r.

    Raises:
        ValueError: for k1 in the loss without weights, and for unknown names.
    """

    coefficient: float
    estimator: KLEstimator | None = None
    place: KLPlace = "loss"
    importance_weight: bool = True

    def __post_init__(self) -> None:
        for what, value, known in (
            ("kl_estimator", self.chosen, get_args(KLEstimator)),
            ("kl_in", self.place, get_args(KLPlace)),
        ):
            if value not in known:
                raise ValueError(f"{what}: unknown {value!r}; valid: {', '.join(known)}")
        if self.place == "loss" and self.chosen == "k1" and not self.importance_weight:
            raise ValueError(
                "kl_estimator=k1 in the loss with kl_importance_weight=false has an expected gradient of 0, so it does "
                "not restrain the policy: use kl_importance_weight=true, or kl_estimator=k2 or k3, or kl_in=reward"
            )

    @property
    def chosen(self) -> KLEstimator:
        """The estimator, also if none was named."""
        return self.estimator or ("k3" if self.place == "loss" else "k1")

    def estimate(self, logprob: Tensor, reference_logprob: Tensor) -> Tensor:
        """The chosen estimate of each token: float64 [T], detached; see :func:`kl_estimate`."""
        return kl_estimate(self.chosen, logprob, reference_logprob)

    def objective(self, inputs: TokenInputs) -> Tensor:
        """``-coefficient`` times the estimate of each token, with its gradient: [T]. For the place ``loss``.

        Values and gradients are finite unless a log-prob is NaN: what overflows is the largest finite number.
        """
        if inputs.reference_logprob is None:
            raise ValueError("KL to the reference: reference_logprob is None; pass the reference's log-probs")
        log_ratio = log_ratio_of(inputs.logprob, inputs.reference_logprob).double()
        value = self.estimate(inputs.logprob, inputs.reference_logprob)
        if self.importance_weight:
            drift = log_ratio_of(inputs.logprob, inputs.old_logprob).double()
            ratio = drift.clamp(max=LARGEST_LOG_RATIO).exp()
            value, slope = ratio * value, ratio * log_ratio
        elif self.chosen == "k2":
            slope = log_ratio
        else:  # k3
            slope = -torch.expm1((-log_ratio).clamp(max=LARGEST_LOG_RATIO))
        dtype = inputs.logprob.dtype
        value, slope = (saturated(-self.coefficient * x, dtype) for x in (value, slope))
        return value + slope * zero_with_gradient(inputs.logprob)
