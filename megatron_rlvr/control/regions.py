"""Which tokens raise entropy and which lower it, exactly to first order, and gradient weights that steer between them.

All tensors are flat over tokens, [T]; log-probabilities and entropies are in nats. The vocabulary sums
``sum_squared_prob`` = sum_x p_x^2 and ``sum_squared_prob_logprob`` = sum_x p_x^2 ln p_x are those of
``ops.token_statistics(..., second_moments=True)``.
"""

from __future__ import annotations

import torch
from torch import Tensor

REGIONS = ("E1", "E2", "E3", "E4")


def classify(logprob: Tensor, entropy: Tensor, advantage: Tensor) -> Tensor:
    """The region of every token: int64 [T] of 1 to 4 for E1 to E4, 0 where the advantage is 0.

    E1 (-ln p < H, A > 0) lowers entropy, E2 (-ln p >= H, A > 0) raises it, E3 (-ln p < H, A < 0) raises it, E4
    (-ln p >= H, A < 0) lowers it. Source: arXiv 2602.09782; a token exactly on the border counts as the less likely.
    """
    unlikely = (-logprob >= entropy).long()
    region = torch.where(advantage > 0, 1 + unlikely, 3 + unlikely)
    return torch.where(advantage == 0, torch.zeros_like(region), region)


def entropy_change(
    logprob: Tensor,
    entropy: Tensor,
    advantage: Tensor,
    sum_squared_prob: Tensor,
    sum_squared_prob_logprob: Tensor,
    *,
    old_logprob: Tensor | None = None,
) -> Tensor:
    """The exact first-order entropy change of an ascent step on each token's objective r A, in logit space.

        c = <grad_z (r A), grad_z H> = -A r [ p_a (ln p_a + H) - sum_x p_x^2 (ln p_x + H) ]

    Returns [T], in nats per unit of learning rate; above 0 raises entropy. ``old_logprob`` gives the importance ratio
    r; without it r = 1, the value before the first update. Source: arXiv 2602.09782, with the vocabulary baseline.
    """
    baseline = sum_squared_prob_logprob + entropy * sum_squared_prob
    change = -advantage * (logprob.exp() * (logprob + entropy) - baseline)
    return change if old_logprob is None else change * (logprob - old_logprob).exp()
