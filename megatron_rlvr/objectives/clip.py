"""The clipped objective of PPO and GRPO under the step's thresholds: static, clip-higher or dynamic."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_rlvr.objectives.tokens import TokenInputs, TokenOutputs, beyond_bounds


@dataclass(frozen=True)
class Clip:
    """min(r A, clip(r, low, high) A), with the bounds of ``inputs.thresholds`` in closed form.

    ``dual_clip``, when given, must exceed 1 and bounds the objective of tokens with A < 0 from below by dual_clip * A,
    so that no single ratio can dominate a step (dual-clip PPO, arXiv 1912.09729, equation 5). It is written over the
    same objective: min(r A, .) below dual_clip * A is replaced by it.
    """

    dual_clip: float | None = None

    def __post_init__(self) -> None:
        if self.dual_clip is not None and not self.dual_clip > 1.0:
            raise ValueError(f"objective: dual_clip must exceed 1, found {self.dual_clip!r}")

    def __call__(self, inputs: TokenInputs) -> TokenOutputs:
        ratio, advantage = inputs.log_ratio().exp(), inputs.advantage
        low, high = inputs.thresholds.ratio_bounds(inputs.old_logprob.exp())
        clipped = torch.maximum(torch.minimum(ratio, high), low)
        objective = torch.minimum(ratio * advantage, clipped * advantage)
        if self.dual_clip is not None:
            floor = self.dual_clip * advantage
            objective = torch.where((advantage < 0) & (objective < floor), floor, objective)
        return TokenOutputs(inputs.weighted(objective), *beyond_bounds(ratio.detach(), low, high, advantage))
