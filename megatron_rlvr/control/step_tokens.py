"""The response tokens of a step, as a trainer that is not this project's hands them to a schedule."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_rlvr.control.regions import entropy_change, gradient_norm, steering_sums, steering_weights
from megatron_rlvr.control.steering import SteeringResponse
from megatron_rlvr.control.thresholds import ClipThresholds

SMALLEST_RATIO = 1e-3
"""Smallest entropy ratio within a step that is reported: a ratio may round to 0, and ln 0 would stop the run."""
AllReduce = Callable[[Tensor], Any]
"""Adds a tensor up over all ranks that hold other tokens, in place, like ``torch.distributed.all_reduce``."""


class Statistics(Protocol):
    """What is read of a ``megatron_rlvr.ops.TokenStatistics``."""

    @property
    def logprob(self) -> Tensor: ...
    @property
    def entropy(self) -> Tensor: ...
    @property
    def sum_squared_prob(self) -> Tensor | None: ...
    @property
    def sum_squared_prob_logprob(self) -> Tensor | None: ...


@dataclass(frozen=True)
class StepTokens:
    """A rank's tokens of a step before its first update: what schedules observe, and the weights of region steering.

    Attributes:
        mean_entropy: over the response tokens of all ranks, in nats per token, for ``schedule.observe``.
        response: how steering would change the step's entropy, of all ranks, for ``schedule.observe``.
        entropy, change: entropy and first-order entropy change of each token, in the shape of the measurement.
        is_active: bool, the response tokens whose advantage is not 0.
        all_reduce: adds up over the ranks.
    """

    mean_entropy: float
    response: SteeringResponse
    entropy: Tensor
    change: Tensor
    is_active: Tensor
    all_reduce: AllReduce | None = None

    @classmethod
    def measure(
        cls,
        statistics: Statistics,
        advantage: Tensor,
        token_weight: Tensor | None = None,
        *,
        all_reduce: AllReduce | None = None,
    ) -> StepTokens:
        """Measure the tokens of a step under the policy that sampled them. It waits for the device once.

        Args:
            statistics: ``ops.token_statistics(..., second_moments=True)`` or a fused form of it, before any update, at
                the temperature of the rollout. Four tensors of one shape, [T] or any other.
            advantage: A of each token, in that shape.
            token_weight: weight of each token in the loss, 0 for tokens that are not part of a response, in that shape.
                Only proportions matter, if all ranks use the same. None for 1.
            all_reduce: adds a float64 [6] up in place over all ranks that hold other tokens, such as data and context
                parallel ranks: ``torch.distributed.all_reduce``, or a ``functools.partial`` of it with a group. None
                for one process. Under tensor parallelism, every rank of a group holds the same tokens and must not add
                them up.

        Raises ValueError for missing second moments, for different shapes, and if no rank has a response token.
        """
        squared, squared_logprob = statistics.sum_squared_prob, statistics.sum_squared_prob_logprob
        if squared is None or squared_logprob is None:
            raise ValueError("statistics: second moments are missing; pass second_moments=True to token_statistics")
        logprob, entropy = statistics.logprob.detach(), statistics.entropy.detach()
        weight = torch.ones_like(logprob) if token_weight is None else token_weight.detach()
        for name, tensor in (("advantage", advantage), ("token_weight", weight)):
            if tensor.shape != logprob.shape:
                raise ValueError(
                    f"{name}: must have the shape of the statistics, {list(logprob.shape)}, found {list(tensor.shape)}"
                )
        is_response = weight != 0
        advantage = torch.where(is_response, advantage.detach(), torch.zeros_like(advantage))
        change = entropy_change(logprob, entropy, advantage, squared, squared_logprob)
        change = torch.where(is_response, change, torch.zeros_like(change))  # padding may hold NaN
        ascent = torch.where(is_response, gradient_norm(logprob, advantage, squared), torch.zeros_like(change))
        entropy = torch.where(is_response, entropy, torch.zeros_like(entropy))
        entropy_sums = torch.stack((entropy.double().sum(), is_response.double().sum()))
        steering = steering_sums(change.flatten(), ascent.flatten(), weight.flatten())
        sums = _summed(torch.cat((entropy_sums, steering)), all_reduce)
        if sums[1] == 0.0:
            raise ValueError("token_weight: 0 for every token of the step, so no entropy can be measured")
        response = SteeringResponse.from_sums(sums[2:])
        return cls(sums[0] / sums[1], response, entropy, change, is_response & (advantage != 0), all_reduce)

    def steering_weights(self, thresholds: ClipThresholds, tokens: Any = ...) -> Tensor:
        """The weight of each token's objective under ``thresholds.steering``; all 1 if that is 0.

        ``tokens`` selects those of a minibatch: a slice, indices or a bool mask of the measurement's shape. Pass the
        result to the operators as ``steering_weight``. No communication.
        """
        return steering_weights(self.change[tokens], thresholds.steering, self.response)

    def entropy_shift(self, entropy: Tensor, tokens: Any = ...) -> float | None:
        """How far the step's earlier updates moved ln entropy, for ``schedule.observe_update``.

        ``entropy`` is that of the minibatch ``tokens`` in the forward pass of its update. Returns ln of the active
        tokens' mean entropy minus ln of their mean entropy before the step; None if no rank has an active token. Every
        rank of ``all_reduce`` must call it. It waits for the device.
        """
        before, is_active = self.entropy[tokens], self.is_active[tokens]
        columns = [torch.where(is_active, each, torch.zeros_like(each)) for each in (entropy.detach(), before)]
        now, old = _summed(torch.stack([column.double().sum() for column in columns]), self.all_reduce)
        if not (old > 0.0 and math.isfinite(now)):
            return None
        return math.log(max(SMALLEST_RATIO, now / old))


def _summed(sums: Tensor, all_reduce: AllReduce | None) -> list[float]:
    if all_reduce is not None:
        all_reduce(sums)
    return sums.tolist()
