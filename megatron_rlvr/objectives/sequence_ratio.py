"""GSPO: one importance ratio for a whole sequence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from megatron_rlvr import ops
from megatron_rlvr.control.bounds import Within, check_bounds
from megatron_rlvr.objectives.tokens import TokenInputs, TokenOutputs, saturated, zero_with_gradient


def sequence_sum(values: Tensor, sequence_index: Tensor, sequence_count: int) -> Tensor:
    """The sum of ``values`` [T] over the tokens of each sequence: float64 [sequence_count]."""
    return values.new_zeros(sequence_count, dtype=torch.float64).index_add(0, sequence_index, values.double())


@dataclass(frozen=True)
class SequenceClip:
    """GSPO: clip s = (pi(y|x) / pi_old(y|x))^(1/|y|), the geometric mean of a sequence's ratios.

    Written per token as in GSPO-token (arXiv 2507.18071): s_t = sg(s) pi_t / sg(pi_t), where sg stops the gradient.
    With one advantage per sequence and sequence-mean aggregation, value and gradient are those of the sequence form,
    and a token's weight acts on its own gradient. All tokens of a sequence must be in the microbatch. The schedule's
    thresholds are not used, because they are functions of a token's probability.
    """

    eps_low: Annotated[float, Within(0.0, 1.0)] = 3e-4
    """Distance of the lower bound of the sequence ratio from 1."""
    eps_high: Annotated[float, Within(0.0)] = 4e-4
    """Distance of the upper bound of the sequence ratio from 1."""

    def __post_init__(self) -> None:
        check_bounds(self, "objective gspo")

    def __call__(self, inputs: TokenInputs) -> TokenOutputs:
        log_ratio = inputs.log_ratio().detach()
        length = sequence_sum(torch.ones_like(log_ratio), inputs.sequence_index, inputs.sequence_count)
        total = sequence_sum(log_ratio, inputs.sequence_index, inputs.sequence_count)
        sequence_log_ratio = saturated(total / length.clamp(min=1.0), log_ratio.dtype)[inputs.sequence_index]
        # ln s_t: its value is the sequence's, its gradient the token's. With an old log-prob of 0 the ratio is s_t.
        token_log_ratio = sequence_log_ratio + zero_with_gradient(inputs.logprob)
        return TokenOutputs.of(
            ops.bounded_objective(
                token_log_ratio,
                torch.zeros_like(token_log_ratio),
                inputs.advantage,
                1.0 - self.eps_low,
                1.0 + self.eps_high,
                weight=inputs.weight,
            )
        )
