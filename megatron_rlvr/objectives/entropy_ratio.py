"""ERC: the clipped objective, without tokens whose entropy has moved too far (arXiv 2512.05591)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch

from megatron_rlvr.control.bounds import Within, check_bounds
from megatron_rlvr.objectives.tokens import TokenInputs, TokenOutputs


@dataclass(frozen=True)
class EntropyRatioClip:
    """ERC: the clipped objective where 1 - bound_low < H / H_old < 1 + bound_high, and 0 elsewhere.

    H is the exact entropy of the distribution that a token was drawn from, H_old the same before the step's updates.
    Where H_old is 0, the token is left out as soon as H is not. The clip is that of ``inputs.thresholds``.
    """

    bound_low: Annotated[float, Within(0.0, 1.0)] = 0.05
    """How far the entropy may fall, as a share of the entropy before the updates."""
    bound_high: Annotated[float, Within(0.0)] = 0.05
    """How far it may rise."""

    def __post_init__(self) -> None:
        check_bounds(self, "objective erc")

    def __call__(self, inputs: TokenInputs) -> TokenOutputs:
        if inputs.old_entropy is None:
            raise ValueError("objective erc: old_entropy is None; pass the entropy of each token before the updates")
        outputs = TokenOutputs.of(inputs.clipped_objective())
        entropy, old = inputs.entropy.detach(), inputs.old_entropy
        is_near = (entropy > (1.0 - self.bound_low) * old) & (entropy < (1.0 + self.bound_high) * old)
        outputs.objective = torch.where(is_near | (entropy == old), outputs.objective, 0.0)
        return outputs
