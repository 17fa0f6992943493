"""SAPO: a sigmoid of the importance ratio in the place of clipping (arXiv 2511.20347)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch

from megatron_rlvr.control.bounds import Within, check_bounds
from megatron_rlvr.objectives.tokens import TokenInputs, TokenOutputs, saturated, zero_with_gradient


@dataclass(frozen=True)
class SoftGate:
    """SAPO: f(r) A with f(r) = 4 / tau * sigmoid(tau (r - 1)), where tau depends on the sign of A.

    The gradient is 4 s (1 - s) r A with s = sigmoid(tau (r - 1)): that of r A at r = 1, and it fades with the distance
    from 1. Nothing is clipped, and the schedule's thresholds are not used.
    """

    tau_positive: Annotated[float, Within(0.0)] = 1.0
    """Temperature of tokens with a positive advantage; a larger one fades faster."""
    tau_negative: Annotated[float, Within(0.0)] = 1.05
    """Temperature of the other tokens."""

    def __post_init__(self) -> None:
        check_bounds(self, "objective sapo")

    def __call__(self, inputs: TokenInputs) -> TokenOutputs:
        advantage = inputs.weighted(inputs.advantage).double()
        ratio = saturated(inputs.log_ratio().detach().double().exp())
        taus = ratio.new_tensor((self.tau_negative, self.tau_positive))
        tau = taus[(inputs.advantage > 0).long()]
        open_share = (tau * (ratio - 1.0)).sigmoid()
        closed_share = (tau * (1.0 - ratio)).sigmoid()  # 1 - open_share would lose its digits
        dtype = inputs.logprob.dtype
        value = saturated(4.0 / tau * open_share * advantage, dtype)
        slope = saturated(4.0 * open_share * (closed_share * ratio) * advantage, dtype)
        none_clipped = torch.zeros_like(slope, dtype=torch.bool)
        return TokenOutputs(value + slope * zero_with_gradient(inputs.logprob), none_clipped, none_clipped)
