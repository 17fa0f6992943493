"""Truncated importance weights, which correct for differences between the sampling engine and the training weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, get_args

import torch
from torch import Tensor

from megatron_rlvr.control.bounds import Within, check_bounds
from megatron_rlvr.objectives.sequence_ratio import sequence_sum
from megatron_rlvr.objectives.tokens import TokenInputs, log_ratio_of, saturated

ImportanceCap = Annotated[float, Within(1.0, includes_low=True)]
ImportanceLevel = Literal["token", "sequence"]


@dataclass(frozen=True)
class TruncatedImportance:
    """The importance weight min(pi_old / pi_rollout, cap) of each token or of its sequence: [T], detached.

    ``pi_old`` is the training weights' probability before the step, ``pi_rollout`` the engine's. ``level`` is ``token``
    (truncated importance sampling of "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training", 2025) or
    ``sequence`` (the product over a sequence's tokens, shared by all of them). ``cap`` must be at least 1.
    """

    cap: ImportanceCap = 2.0
    """Largest weight."""
    level: ImportanceLevel = "token"
    """Whether each token has its own weight or shares that of its sequence."""

    def __post_init__(self) -> None:
        if self.level not in get_args(ImportanceLevel):
            raise ValueError(f"importance level: unknown {self.level!r}; valid: {', '.join(get_args(ImportanceLevel))}")
        check_bounds(self, "importance weights")

    def __call__(self, inputs: TokenInputs) -> Tensor:
        if inputs.rollout_logprob is None:
            raise ValueError("importance weights: rollout_logprob is None; pass the log-probs of the sampling engine")
        log_weight = log_ratio_of(inputs.old_logprob, inputs.rollout_logprob)
        if self.level == "sequence":
            total = sequence_sum(log_weight, inputs.sequence_index, inputs.sequence_count)[inputs.sequence_index]
            log_weight = saturated(total, log_weight.dtype)
        return torch.exp(log_weight).clamp(max=self.cap)
