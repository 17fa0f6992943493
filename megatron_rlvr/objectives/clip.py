"""The clipped objective of PPO and GRPO: under the step's thresholds, with a dual clip, and under DCPO's bounds."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_rlvr import ops
from megatron_rlvr.objectives.tokens import TokenInputs, TokenOutputs, beyond_bounds


def clipped_surrogate(ratio: Tensor, advantage: Tensor, low: Tensor | float, high: Tensor | float) -> Tensor:
    """min(r A, clip(r, low, high) A), [T]; the bounds are numbers or [T]. PPO, arXiv 1707.06347, equation 7."""
    low, high = torch.as_tensor(low, dtype=ratio.dtype), torch.as_tensor(high, dtype=ratio.dtype)
    clipped = torch.maximum(torch.minimum(ratio, high), low)
    return torch.minimum(ratio * advantage, clipped * advantage)


@dataclass(frozen=True)
class Clip:
    """PPO and GRPO with the bounds of ``inputs.thresholds``: static, clip-higher or dynamic, as the schedule says.

    It is :func:`megatron_rlvr.ops.clipped_objective`, so the tensors are float32.

    ``dual_clip``, when given, must exceed 1: where A < 0 the objective is not allowed below dual_clip * A, so that a
    single huge ratio cannot dominate a step. Dual-clip PPO, arXiv 1912.09729.
    """

    dual_clip: float | None = None

    def __post_init__(self) -> None:
        if self.dual_clip is not None and not self.dual_clip > 1.0:
            raise ValueError(f"objective: dual_clip must exceed 1, found {self.dual_clip!r}")

    def __call__(self, inputs: TokenInputs) -> TokenOutputs:
        advantage = inputs.advantage
        objective = ops.clipped_objective(inputs.logprob, inputs.old_logprob, advantage, inputs.thresholds).objective
        if self.dual_clip is not None:
            floor = self.dual_clip * advantage
            objective = torch.where((advantage < 0) & (objective < floor), floor, objective)
        low, high = inputs.thresholds.ratio_bounds(inputs.old_logprob.exp())
        ratio = inputs.log_ratio().detach().exp()
        return TokenOutputs(inputs.weighted(objective), *beyond_bounds(ratio, low, high, advantage))


@dataclass(frozen=True)
class DynamicClip:
    """DCPO: bounds that follow from |r - 1| p <= eps, wider for unlikely tokens. arXiv 2509.02333.

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
        """(low, high) for old probabilities [T]."""
        low = 0.5 + 0.5 * (1.0 - 4.0 * self.eps_low / old_prob).clamp(min=0.0).sqrt()
        high = 0.5 + 0.5 * (1.0 + 4.0 * self.eps_high / old_prob).sqrt()
        return low, high.clamp(max=self.max_ratio)

    def __call__(self, inputs: TokenInputs) -> TokenOutputs:
        ratio = inputs.log_ratio().exp()
        low, high = self.bounds(inputs.old_logprob.exp())
        objective = clipped_surrogate(ratio, inputs.advantage, low, high)
        return TokenOutputs(inputs.weighted(objective), *beyond_bounds(ratio.detach(), low, high, inputs.advantage))
