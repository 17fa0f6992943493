"""Objectives that keep the gradient of tokens beyond the bounds: CE-GPPO and CISPO."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch

from megatron_rlvr.control.bounds import Within, check_bounds
from megatron_rlvr.objectives.tokens import TokenInputs, TokenOutputs, saturated, zero_with_gradient


@dataclass(frozen=True)
class GradientPreservingClip:
    """CE-GPPO: beyond a bound, the gradient is that of a token at the bound, scaled. arXiv 2509.20712.

    With sg a stopped gradient: beta_low * low * (r / sg(r)) * A where r < low and A < 0,
    beta_high * high * (r / sg(r)) * A where r > high and A > 0, and r A elsewhere. The bounds are those of
    ``inputs.thresholds``. With both betas 0, the only difference from the clipped objective is the constant value of
    clipped tokens.
    """

    beta_low: Annotated[float, Within(0.0, includes_low=True)] = 0.75
    """Scale of the gradient of tokens below the lower bound."""
    beta_high: Annotated[float, Within(0.0, includes_low=True)] = 1.0
    """Scale of the gradient of tokens above the upper bound."""

    def __post_init__(self) -> None:
        check_bounds(self, "objective ce-gppo")

    def __call__(self, inputs: TokenInputs) -> TokenOutputs:
        clipped = inputs.clipped_objective()
        value = clipped.objective.detach()  # r A, or the bound times A; beta times this is the gradient at ln pi
        scaled_high = torch.where(clipped.is_clipped_high, self.beta_high * value, value)
        scaled = torch.where(clipped.is_clipped_low, self.beta_low * value, scaled_high)
        unit = zero_with_gradient(inputs.logprob).exp()  # 1, with the gradient of ln pi
        return TokenOutputs(saturated(scaled) * unit, clipped.is_clipped_high, clipped.is_clipped_low)


@dataclass(frozen=True)
class ClippedImportanceWeight:
    """CISPO: sg(clip(r)) A ln pi, where sg stops the gradient, so that every token keeps one.

    The weight is cut at the upper bound of ``inputs.thresholds`` and, with ``clip_low``, at the lower one; the paper
    uses the upper bound alone. Source: MiniMax-M1, arXiv 2506.13585, equation 4.
    """

    clip_low: bool = False
    """Clip the weight at the lower threshold, too."""

    def __call__(self, inputs: TokenInputs) -> TokenOutputs:
        logprob = inputs.logprob.detach()
        ratio = inputs.log_ratio().detach().double().exp()
        low, high = inputs.thresholds.ratio_bounds(inputs.old_logprob.exp())
        weight = torch.minimum(ratio, high)
        if self.clip_low:
            weight = torch.maximum(weight, low)
        slope = saturated(inputs.weighted(weight * inputs.advantage), logprob.dtype)
        value = torch.where(slope == 0, slope, saturated(slope * logprob))  # p ln p = 0 at p = 0
        objective = value + slope * zero_with_gradient(inputs.logprob)
        clipped = inputs.clipped_objective()  # for its gate: the same bounds
        return TokenOutputs(objective, clipped.is_clipped_high, clipped.is_clipped_low & self.clip_low)
