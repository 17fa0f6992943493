"""The clipped objective of PPO and GRPO: under the step's thresholds, with a dual clip, and under DCPO's bounds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from torch import Tensor

from megatron_rlvr import ops
from megatron_rlvr.control.bounds import Within, check_bounds
from megatron_rlvr.objectives.tokens import TokenInputs, TokenOutputs


@dataclass(frozen=True)
class Clip:
    """PPO and GRPO with the bounds of ``inputs.thresholds``: static, clip-higher or dynamic, depending on the schedule.

    With ``dual_clip``, which must exceed 1, the objective of a token with A < 0 is at least dual_clip * A, so that a
    single huge ratio cannot dominate a step. Sources: PPO, arXiv 1707.06347, equation 7; dual clip, arXiv 1912.09729.
    """

    dual_clip: Annotated[float, Within(1.0)] | None = None
    """Bound on the loss of a token with a negative advantage, as a multiple of the advantage; null sets none."""

    def __post_init__(self) -> None:
        check_bounds(self, "objective clip")

    def __call__(self, inputs: TokenInputs) -> TokenOutputs:
        return TokenOutputs.of(inputs.clipped_objective(self.dual_clip))


@dataclass(frozen=True)
class DynamicClip:
    """DCPO: the bounds follow from |r - 1| p <= eps, which is wider for unlikely tokens. arXiv 2509.02333.

    With q the old probability, low = (1 + sqrt(max(1 - 4 eps_low / q, 0))) / 2 and
    high = (1 + sqrt(1 + 4 eps_high / q)) / 2, at most ``max_ratio``. The schedule's thresholds are not used.
    """

    eps_low: Annotated[float, Within(0.0)] = 0.16
    """Bound on |r - 1| p for ratios r below 1, where p is the token's probability."""
    eps_high: Annotated[float, Within(0.0)] = 0.2
    """Bound on |r - 1| p for ratios r above 1."""
    max_ratio: Annotated[float, Within(1.0)] = 10.0
    """Largest upper bound of the importance ratio."""

    def __post_init__(self) -> None:
        check_bounds(self, "objective dcpo")

    def bounds(self, old_prob: Tensor) -> tuple[Tensor, Tensor]:
        """(low, high), [T], for old probabilities [T]."""
        low = 0.5 + 0.5 * (1.0 - 4.0 * self.eps_low / old_prob).clamp(min=0.0).sqrt()
        high = 0.5 + 0.5 * (1.0 + 4.0 * self.eps_high / old_prob).sqrt()
        return low, high.clamp(max=self.max_ratio)

    def __call__(self, inputs: TokenInputs) -> TokenOutputs:
        bounds = self.bounds(inputs.old_logprob.exp())
        return TokenOutputs.of(
            ops.bounded_objective(inputs.logprob, inputs.old_logprob, inputs.advantage, *bounds, weight=inputs.weight)
        )
