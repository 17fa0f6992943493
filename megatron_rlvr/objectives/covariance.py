"""Clip-Cov and KL-Cov: restrain the few tokens whose log-prob and advantage covary most (arXiv 2505.22617)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

import torch
from torch import Tensor

from megatron_rlvr import ops
from megatron_rlvr.control.bounds import Within, check_bounds
from megatron_rlvr.objectives.tokens import TokenInputs, TokenOutputs, saturated, zero_with_gradient


def token_covariance(logprob: Tensor, advantage: Tensor) -> Tensor:
    """(ln pi - mean ln pi) (A - mean A), detached, float64 [T]; means over the microbatch. arXiv 2505.22617."""
    logprob, advantage = saturated(logprob.detach()).double(), advantage.double()  # an impossible token has no NaN
    return (logprob - logprob.mean()) * (advantage - advantage.mean())


def _restrained_count(share: float, tokens: int) -> int:
    """Number of tokens that a share amounts to. At least one, so that small microbatches are restrained, too."""
    return min(tokens, max(1, int(share * tokens)))


@dataclass
class CovarianceClip:
    """Clip-Cov: the clipped objective, without ``share`` of the tokens, drawn from those of high covariance.

    The tokens are drawn uniformly from those with covariance in [lower, upper] that are not clipped already, as in the
    authors' implementation. The draw depends only on ``seed``, on the step and on the order of calls within it, so that
    a resumed run repeats it.
    """

    share: Annotated[float, Within(0.0, 1.0)] = 2e-4
    """Share of the tokens of a microbatch that are left out."""
    lower: Annotated[float, Within(-1e6)] = 1.0
    """Smallest covariance of a token that may be left out."""
    upper: Annotated[float, Within(-1e6)] = 5.0
    """Largest covariance of a token that may be left out, greater than `lower`."""
    seed: Annotated[int, Within(0, includes_low=True, cap=2**62)] = 0
    """Seed of the draw."""
    _generator: torch.Generator = field(default_factory=torch.Generator, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_bounds(self, "objective clip-cov")
        if not self.lower < self.upper:
            raise ValueError(f"objective clip-cov: needs lower < upper, found {self.lower!r}, {self.upper!r}")
        self.start_step(0)

    def start_step(self, step: int) -> None:
        """Begin the random draws of ``step``."""
        self._generator.manual_seed((self.seed * 1_000_003 + step) % 2**63)

    def __call__(self, inputs: TokenInputs) -> TokenOutputs:
        outputs = TokenOutputs.of(inputs.clipped_objective())
        covariance = token_covariance(inputs.logprob, inputs.advantage)
        is_clipped = outputs.clipped_high | outputs.clipped_low
        candidate = (covariance >= self.lower) & (covariance <= self.upper) & ~is_clipped
        key = torch.rand(len(covariance), generator=self._generator).to(covariance.device)
        key = torch.where(candidate, key, -1.0)
        drawn = torch.zeros_like(candidate)
        drawn[key.topk(_restrained_count(self.share, len(covariance))).indices] = True
        outputs.objective = torch.where(drawn & candidate, 0.0, outputs.objective)
        return outputs


@dataclass(frozen=True)
class CovarianceKL:
    """KL-Cov: r A, and for the ``share`` of tokens of highest covariance r A - coefficient * |ln r|.

    Nothing is clipped. |ln r| is the authors' per-token estimate of KL(pi_old, pi).
    """

    share: Annotated[float, Within(0.0, 1.0)] = 2e-4
    """Share of the tokens of a microbatch that are penalized."""
    coefficient: Annotated[float, Within(0.0, includes_low=True)] = 1.0
    """Weight of the penalty."""

    def __post_init__(self) -> None:
        check_bounds(self, "objective kl-cov")

    def __call__(self, inputs: TokenInputs) -> TokenOutputs:
        covariance = token_covariance(inputs.logprob, inputs.advantage)
        highest = torch.zeros_like(covariance, dtype=torch.bool)
        highest[covariance.topk(_restrained_count(self.share, len(covariance))).indices] = True
        unbounded = ops.bounded_objective(
            inputs.logprob, inputs.old_logprob, inputs.advantage, -torch.inf, torch.inf, weight=inputs.weight
        )
        log_ratio = inputs.log_ratio().detach()
        slope = inputs.weighted(-self.coefficient * log_ratio.sign())
        penalty = torch.where(highest, slope * log_ratio, torch.zeros_like(slope))
        value = saturated(unbounded.objective.detach() + saturated(penalty))
        gradient = torch.where(highest, slope, torch.zeros_like(slope)) * zero_with_gradient(inputs.logprob)
        objective = value + zero_with_gradient(unbounded.objective) + gradient
        none_clipped = torch.zeros_like(highest)
        return TokenOutputs(objective, none_clipped, none_clipped)
