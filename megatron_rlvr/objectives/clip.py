"""The clipped objective of PPO and GRPO: under the step's thresholds, with a dual clip, and under DCPO's bounds."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from megatron_rlvr import ops
from megatron_rlvr.objectives.tokens import TokenInputs, TokenOutputs


@dataclass(frozen=True)
class Clip:
    """PPO and GRPO with the bounds of ``inputs.thresholds``: static, clip-higher or dynamic, depending on the schedule.

    ``dual_clip``, where given, must exceed 1. Then, where A < 0, the objective is at least dual_clip * A, so that a
    single huge ratio cannot dominate a step. Sources: PPO, arXiv 1707.06347, equation 7; dual clip, arXiv 1912.09729.
    """

    dual_clip: float | None = None

    def __post_init__(self) -> None:
        if self.dual_clip is not None and not self.dual_clip > 1.0:
            raise ValueError(f"objective: dual_clip must exceed 1, found {self.dual_clip!r}")

    def __call__(self, inputs: TokenInputs) -> TokenOutputs:
        return TokenOutputs.of(inputs.clipped_objective(self.dual_clip))


@dataclass(frozen=True)
class DynamicClip:
    """DCPO: the bounds follow from |r - 1| p <= eps, which is wider for unlikely tokens. arXiv 2509.02333.

    With q the old probability, low = (1 + sqrt(max(1 - 4 eps_low / q, 0))) / 2 and
    high = (1 + sqrt(1 + 4 eps_high / q)) / 2, at most ``max_ratio``. The schedule's thresholds are not used.
    """

    eps_low: float = 0.16
    eps_high: float = 0.2
    max_ratio: float = 10.0

    def __post_init__(self) -> None:
        if not (self.eps_low > 0 and self.eps_high > 0 and self.max_ratio > 1):
            raise ValueError(
                "objective dcpo: needs eps_low > 0, eps_high > 0 and max_ratio > 1, "
                f"found {self.eps_low!r}, {self.eps_high!r}, {self.max_ratio!r}"
            )

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
