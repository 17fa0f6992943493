"""The inputs and outputs of every token objective."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_rlvr import ops
from megatron_rlvr.control.thresholds import ClipThresholds


def saturated(values: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """``values`` in ``dtype`` (None: theirs), the largest finite number of its sign where one overflows it.

    NaN stays NaN.
    """
    dtype = dtype or values.dtype
    largest = torch.finfo(dtype).max
    return values.clamp(-largest, largest).to(dtype)


def log_ratio_of(logprob: Tensor, old_logprob: Tensor) -> Tensor:
    """The finite ln r = ``logprob - old_logprob``, detached: 0 where the log-probs are equal, also where both are -inf.

    NaN stays NaN.
    """
    logprob, old_logprob = logprob.detach(), old_logprob.detach()
    return saturated(torch.where(logprob == old_logprob, torch.zeros_like(logprob), logprob - old_logprob))


class _ZeroWithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return torch.zeros_like(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


def zero_with_gradient(values: Tensor) -> Tensor:
    """0 with the gradient of ``values``, which ``values - values.detach()`` is not where a log-prob is -inf."""
    zero: Tensor = _ZeroWithGradient.apply(values)
    return zero


@dataclass
class TokenInputs:
    """The response tokens of one microbatch, flat. Tensors are [T]; log-probs and entropies are in nats.

    Attributes:
        logprob: of the current policy, with gradient.
        entropy: of the current policy's distribution, with gradient where an objective has an entropy term.
        old_logprob: of the training weights before the step's updates.
        advantage: A of each token, the same for all tokens of a sequence.
        sequence_index: int64, the sequence of the microbatch that a token belongs to, in [0, sequence_count).
        sequence_count: number of sequences of the microbatch.
        thresholds: the clip thresholds of this step.
        weight: multiplies each token's objective (region steering, importance weights); None for 1, which
            ``clipped_objective`` refuses if the thresholds steer.
        rollout_logprob: of the engine that sampled the token.
        importance_weight: of the corrections that do not follow updates; None computes it from these tokens.
        reference_logprob: of the reference policy.
        old_entropy: of the policy before the step's updates.
        sum_squared_prob, sum_squared_prob_logprob: from ``ops.token_statistics(..., second_moments=True)``.
    """

    logprob: Tensor
    entropy: Tensor
    old_logprob: Tensor
    advantage: Tensor
    sequence_index: Tensor
    sequence_count: int
    thresholds: ClipThresholds
    weight: Tensor | None = None
    rollout_logprob: Tensor | None = None
    importance_weight: Tensor | None = None
    reference_logprob: Tensor | None = None
    old_entropy: Tensor | None = None
    sum_squared_prob: Tensor | None = None
    sum_squared_prob_logprob: Tensor | None = None

    def log_ratio(self) -> Tensor:
        """ln r = ln pi(a|s) - ln pi_old(a|s), [T]; finite unless a log-prob is NaN."""
        return log_ratio_of(self.logprob, self.old_logprob) + zero_with_gradient(self.logprob)

    def weighted(self, values: Tensor) -> Tensor:
        """``values`` [T] times the token weights, if there are any."""
        return values if self.weight is None else values * self.weight

    def clipped_objective(self, dual_clip: float | None = None) -> ops.ClippedObjective:
        """The weighted clipped objective of these tokens under their thresholds, with its gate."""
        return ops.clipped_objective(
            self.logprob,
            self.old_logprob,
            self.advantage,
            self.thresholds,
            dual_clip=dual_clip,
            steering_weight=self.weight,
        )


@dataclass
class TokenOutputs:
    """What a token objective returns.

    Attributes:
        objective: [T], to be maximised.
        clipped_high: bool [T], tokens with A > 0 and the ratio above its upper bound.
        clipped_low: bool [T], tokens with A < 0 and the ratio below its lower bound.
    """

    objective: Tensor
    clipped_high: Tensor
    clipped_low: Tensor

    @classmethod
    def of(cls, result: ops.ClippedObjective | ops.FusedObjective) -> TokenOutputs:
        """The outputs of a clipped objective as the operator computed it."""
        return cls(result.objective, result.is_clipped_high, result.is_clipped_low)


TokenObjective = Callable[[TokenInputs], TokenOutputs]
