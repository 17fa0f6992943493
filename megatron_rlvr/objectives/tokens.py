"""What every token objective takes and gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from megatron_rlvr.control.thresholds import ClipThresholds


@dataclass
class TokenInputs:
    """The response tokens of one microbatch, flat: every tensor is [T], log-probabilities and entropies in nats.

    ``logprob`` carries gradient, and ``entropy`` where an objective has an entropy term. ``old_logprob`` is that of the
    training weights before the step's updates, ``rollout_logprob`` that of the engine which sampled the token.
    ``sequence_index`` (int64) says which of the microbatch's ``sequence_count`` sequences a token belongs to.
    ``weight`` multiplies a token's objective: region steering. The second moments are those of
    ``ops.token_statistics(..., second_moments=True)``.
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
    sum_squared_prob: Tensor | None = None
    sum_squared_prob_logprob: Tensor | None = None

    def log_ratio(self) -> Tensor:
        """ln r = ln pi(a|s) - ln pi_old(a|s), [T]."""
        return self.logprob - self.old_logprob

    def weighted(self, objective: Tensor) -> Tensor:
        """``objective`` [T] times the token weights, where there are any."""
        return objective if self.weight is None else objective * self.weight


@dataclass
class TokenOutputs:
    """``objective`` [T], to be maximised; ``clipped_high`` and ``clipped_low``, bool [T]: tokens a bound acts on.

    High: A > 0 and the ratio above its upper bound; low: A < 0 and the ratio below its lower one.
    """

    objective: Tensor
    clipped_high: Tensor
    clipped_low: Tensor


TokenObjective = Callable[[TokenInputs], TokenOutputs]


def beyond_bounds(ratio: Tensor, low: Tensor | float, high: Tensor | float, advantage: Tensor) -> tuple[Tensor, Tensor]:
    """(clipped_high, clipped_low), bool [T], of ratios [T] against their bounds."""
    return (advantage > 0) & (ratio > high), (advantage < 0) & (ratio < low)
