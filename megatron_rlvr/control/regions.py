"""Which tokens raise entropy and which lower it, exactly to first order, and gradient weights that steer between them.

All tensors are [T], flat over tokens. Log-probs and entropies are in nats. The vocabulary sums
``sum_squared_prob`` = sum_x p_x^2 and ``sum_squared_prob_logprob`` = sum_x p_x^2 ln p_x are those of
``ops.token_statistics(..., second_moments=True)``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_rlvr.control.steering import SteeringResponse

__all__ = [
    "REGIONS",
    "classify",
    "disagrees",
    "entropy_change",
    "gradient_norm",
    "steering_direction",
    "steering_sums",
    "steering_weights",
]

REGIONS = ("E1", "E2", "E3", "E4")
LOWEST_LOGPROB = -1e4
"""p ln p of a smaller log-prob is 0 in float64, where -inf would make it NaN."""
LARGEST_LOG_RATIO = 350.0
"""A larger ratio times any float32 number but 0 overflows float32, and the ratio itself still fits float64."""


def classify(logprob: Tensor, entropy: Tensor, advantage: Tensor) -> Tensor:
    """Classify each token into an entropy region: int64 [T], 1 to 4 for E1 to E4.

    ======  ==============  =====  =================
    region  -ln p           A      effect on entropy
    ======  ==============  =====  =================
    E1      below H         A > 0  lowers
    E2      H or above      A > 0  raises
    E3      below H         A < 0  raises
    E4      H or above      A < 0  lowers
    ======  ==============  =====  =================

    Tokens with A = 0, or with NaN among the three numbers, are in no region: 0. Source: arXiv 2602.09782.

    The effect of a region is that of the token's own term in :func:`entropy_change`. The vocabulary baseline is never
    negative, so E2 always raises entropy and E4 always lowers it, to first order, while a token of E1 or E3 has the
    opposite effect if the baseline exceeds its own term.

    The border -ln p = H belongs to E2 and E4. There the token's own term p_a (ln p_a + H) of :func:`entropy_change` is
    0, and the vocabulary baseline sum_x p_x^2 (ln p_x + H) decides alone. The baseline is the covariance of p_x and
    ln p_x under p, so it is never negative (and 0 only where all possible tokens are equally likely): at the border a
    token with A > 0 never lowers entropy and one with A < 0 never raises it.
    """
    likely, unlikely = -logprob < entropy, -logprob >= entropy
    masks = (
        (advantage > 0) & likely,
        (advantage > 0) & unlikely,
        (advantage < 0) & likely,
        (advantage < 0) & unlikely,
    )
    region = torch.zeros_like(advantage, dtype=torch.int64)
    for number, mask in enumerate(masks, start=1):
        region = torch.where(mask, number, region)
    return region


def disagrees(region: Tensor, change: Tensor) -> Tensor:
    """Whether the exact change of each token has the opposite sign of its region's: bool [T].

    ``region`` is :func:`classify`, ``change`` :func:`entropy_change`. Only tokens of E1 and E3 can disagree.
    """
    return ((region == 1) & (change > 0)) | ((region == 3) & (change < 0))


def entropy_change(
    logprob: Tensor,
    entropy: Tensor,
    advantage: Tensor,
    sum_squared_prob: Tensor,
    sum_squared_prob_logprob: Tensor,
    *,
    old_logprob: Tensor | None = None,
) -> Tensor:
    """The exact first-order entropy change of an ascent step on each token's objective r A, in logit space: [T].

        c = <grad_z (r A), grad_z H> = -A r [ p_a (ln p_a + H) - sum_x p_x^2 (ln p_x + H) ]

    It is in nats per unit of learning rate; a positive change raises entropy. ``old_logprob`` gives the importance
    ratio r. Without it r = 1, the value before the first update. Finite for any log-prob, -inf included: a change that
    overflows is the largest finite number of its sign. Source: arXiv 2602.09782, with the vocabulary baseline, the sum
    over x.
    """
    baseline = sum_squared_prob_logprob + entropy * sum_squared_prob
    own = logprob.exp() * (logprob.clamp(min=LOWEST_LOGPROB) + entropy)
    change = -advantage.double() * (own - baseline)
    if old_logprob is not None:
        log_ratio = torch.where(logprob == old_logprob, torch.zeros_like(logprob), logprob - old_logprob)
        change = change * log_ratio.double().clamp(max=LARGEST_LOG_RATIO).exp()
    return _saturated(change, logprob.dtype)


def gradient_norm(logprob: Tensor, advantage: Tensor, sum_squared_prob: Tensor) -> Tensor:
    """The squared norm n = A^2 (1 - 2 p_a + sum_x p_x^2) of each token's logit gradient at r = 1: [T].

    It is also the first-order rise of the token's objective r A in an ascent step, per unit of learning rate.
    """
    squared = advantage.double().square() * (1.0 - 2.0 * logprob.exp() + sum_squared_prob).clamp(min=0.0)
    return _saturated(squared, logprob.dtype)


def _saturated(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Float64 ``values`` in ``dtype``, the largest finite number of their sign where they overflow; NaN stays NaN."""
    largest = torch.finfo(dtype).max
    return values.clamp(-largest, largest).to(dtype)


def steering_direction(change: Tensor) -> Tensor:
    """The direction s of each token: [T], +1 if its gradient raises entropy, -1 if it lowers it, 0 otherwise.

    ``change`` is :func:`entropy_change`.
    """
    return torch.sign(change)


def steering_sums(change: Tensor, ascent: Tensor, token_weight: Tensor) -> Tensor:
    """The four sums of :class:`~megatron_rlvr.control.SteeringResponse`: float64 [4], to be added over all ranks.

    ``change`` and ``ascent`` are :func:`entropy_change` and :func:`gradient_norm` of the tokens before the first
    update, ``token_weight`` their aggregation weights; all [T].
    """
    direction = steering_direction(change)
    columns = torch.stack((change, change * direction, ascent, ascent * direction)).double()
    return columns @ token_weight.double()


def steering_weights(change: Tensor, steering: float, response: SteeringResponse) -> Tensor:
    """The gradient weight (1 + u s) / (1 + u nu) of each token under steering u in (-1, 1): [T], positive.

    The division preserves the step's first-order reward ascent: sum n (1 + u s) / (1 + u nu) = sum n. Derived in
    docs/entropy_control/derivation.md.
    """
    return (1.0 + steering * steering_direction(change)) / response.normaliser(steering)


def __dir__() -> list[str]:
    return sorted(__all__)
