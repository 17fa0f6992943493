"""Objectives that keep the gradient of tokens beyond the bounds: CE-GPPO and CISPO."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_rlvr.objectives.tokens import TokenInputs, TokenOutputs, beyond_bounds


@dataclass(frozen=True)
class GradientPreservingClip:
    """CE-GPPO: beyond a bound, the gradient is that of a token at the bound, scaled. arXiv 2509.20712.

    r < low and A < 0: beta_low * low * (r / sg(r)) * A.   r > high and A > 0: beta_high * high * (r / sg(r)) * A.
    Elsewhere r A. The bounds are those of ``inputs.thresholds``; with both betas 0 only the clipped tokens' constant
    value differs from the clipped objective.
    """

    beta_low: float = 0.75
    beta_high: float = 1.0

    def __post_init__(self) -> None:
        if not (self.beta_low >= 0 and self.beta_high >= 0):
            raise ValueError(
                f"objective ce-gppo: beta_low and beta_high must not be negative, "
                f"found {self.beta_low!r}, {self.beta_high!r}"
            )

    def __call__(self, inputs: TokenInputs) -> TokenOutputs:
        ratio, advantage = inputs.log_ratio().exp(), inputs.advantage
        low, high = inputs.thresholds.ratio_bounds(inputs.old_logprob.exp())
        beyond_high, beyond_low = beyond_bounds(ratio.detach(), low, high, advantage)
        unit = ratio / ratio.detach()  # 1, with the gradient of ln pi
        objective = ratio * advantage
        objective = torch.where(beyond_high, self.beta_high * high * unit * advantage, objective)
        objective = torch.where(beyond_low, self.beta_low * low * unit * advantage, objective)
        return TokenOutputs(inputs.weighted(objective), beyond_high, beyond_low)


@dataclass(frozen=True)
class ClippedImportanceWeight:
    """CISPO: sg(clip(r)) A ln pi, so that every token keeps a gradient. MiniMax-M1, arXiv 2506.13585, equation 4.

    The weight is cut at the upper bound of ``inputs.thresholds`` and, with ``clip_low``, at the lower one; the paper
    uses the upper bound alone.
    """

    clip_low: bool = False

    def __call__(self, inputs: TokenInputs) -> TokenOutputs:
        ratio = inputs.log_ratio().exp().detach()
        low, high = inputs.thresholds.ratio_bounds(inputs.old_logprob.exp())
        clipped = torch.minimum(ratio, high)
        if self.clip_low:
            clipped = torch.maximum(clipped, low)
        objective = clipped * inputs.advantage * inputs.logprob
        beyond_high, beyond_low = beyond_bounds(ratio, low, high, inputs.advantage)
        return TokenOutputs(inputs.weighted(objective), beyond_high, beyond_low & self.clip_low)
