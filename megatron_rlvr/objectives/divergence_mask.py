"""DPPO: tokens are left out where the policy has moved too far, as a divergence says (arXiv 2602.04879)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from megatron_rlvr.control.bounds import Within, check_bounds
from megatron_rlvr.objectives.tokens import TokenInputs, TokenOutputs, saturated, zero_with_gradient


@dataclass(frozen=True)
class DivergenceMask:
    """DPPO: min(r, max_ratio) A where the policies are near, 0 where an update has moved them apart.

    DPPO leaves out tokens with A > 0 and p > q, or A < 0 and p < q, if the divergence of their binary distribution
    (this token or any other) exceeds a bound. p is the current probability, q the old one. ``tv`` is |p - q|, ``kl`` is
    q ln(q / p) + (1 - q) ln((1 - q) / (1 - p)). The ratio's factor carries no gradient of its own beyond that of r A.
    The schedule's thresholds are not used.
    """

    divergence: Literal["tv", "kl"] = "tv"
    """The divergence: total variation, ``tv``, or ``kl``, of the old policy to the current one."""
    bound_low: Annotated[float, Within(0.0)] = 0.2
    """Largest divergence of a token with a negative advantage."""
    bound_high: Annotated[float, Within(0.0)] = 0.2
    """Largest divergence of a token with a positive advantage."""
    max_ratio: Annotated[float, Within(1.0)] = 20.0
    """Largest importance ratio that multiplies an advantage."""
    log_ratio_penalty: Annotated[float, Within(0.0, includes_low=True)] = 0.0
    """Weight of (ln r)^2, which is subtracted for every token; prime-rl uses 0.001."""

    def __post_init__(self) -> None:
        check_bounds(self, "objective dppo")
        if self.divergence not in ("tv", "kl"):
            raise ValueError(f"objective dppo: divergence must be tv or kl, found {self.divergence!r}")

    def distance(self, prob: Tensor, old_prob: Tensor) -> Tensor:
        """The divergence of each token's binary distribution, [T], from probabilities [T]."""
        if self.divergence == "tv":
            return (prob - old_prob).abs()
        own = torch.special.xlogy(old_prob, old_prob) - torch.special.xlogy(old_prob, prob)
        rest, old_rest = 1.0 - prob, 1.0 - old_prob
        return own + torch.special.xlogy(old_rest, old_rest) - torch.special.xlogy(old_rest, rest)

    def __call__(self, inputs: TokenInputs) -> TokenOutputs:
        advantage = inputs.advantage
        prob, old_prob = inputs.logprob.detach().double().exp(), inputs.old_logprob.double().exp()
        log_ratio = inputs.log_ratio().detach().double()
        distance = self.distance(prob, old_prob)
        clipped_high = (advantage > 0) & (prob > old_prob) & (distance > self.bound_high)
        clipped_low = (advantage < 0) & (prob < old_prob) & (distance > self.bound_low)
        dtype = inputs.logprob.dtype
        ratio = log_ratio.exp().clamp(max=self.max_ratio)
        kept = torch.where(clipped_high | clipped_low, 0.0, ratio * inputs.weighted(advantage).double())
        pull = inputs.weighted(self.log_ratio_penalty * log_ratio).double() if self.log_ratio_penalty else 0.0
        value, slope = saturated(kept - pull * log_ratio, dtype), saturated(kept - 2.0 * pull, dtype)
        return TokenOutputs(value + slope * zero_with_gradient(inputs.logprob), clipped_high, clipped_low)
