"""Corrections of the difference between the policy that sampled a token and the one that trains on it.

A correction is a weight of every token, from the log-probs of the two policies. A `Correction` compares a measure of a
token or of its sequence with bounds, and truncates, masks or rejects what is outside. `importance_presets` names those
in use. Corrections multiply: `ImportanceWeights` holds several.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Literal, get_args

import torch
from torch import Tensor

from megatron_rlvr.control.bounds import Within, check_bounds
from megatron_rlvr.objectives.order_statistics import Total, largest_cut, of_this_process
from megatron_rlvr.objectives.sequence_ratio import sequence_sum
from megatron_rlvr.objectives.tokens import log_ratio_of, saturated

Level = Literal["token", "sequence", "geometric"]
Action = Literal["truncate", "mask", "reject"]
Measure = Literal["ratio", "k1", "k2", "k3"]
Policy = Literal["old", "current"]
Advantages = Literal["any", "negative"]
Bound = Annotated[float, Within(-1e6, includes_low=True)]

LARGEST_LOG_WEIGHT = 20.0
"""Logarithms of ratios are cut here, above every bound, so that products with a weight stay finite; as verl does."""


@dataclass(frozen=True)
class SampledTokens:
    """Tokens as a correction sees them: all tokens of some sequences, flat. Tensors are [T]; log-probs are in nats.

    Attributes:
        logprob: of the policy that trains.
        rollout_logprob: of the engine that sampled the token.
        advantage: A of each token, the same for all tokens of a sequence.
        sequence_index: int64, the sequence of each token, in [0, sequence_count).
        sequence_count: number of sequences.
    """

    logprob: Tensor
    rollout_logprob: Tensor
    advantage: Tensor
    sequence_index: Tensor
    sequence_count: int

    def log_ratio(self) -> Tensor:
        """ln pi(a|s) - ln pi_rollout(a|s), [T], detached."""
        return log_ratio_of(self.logprob, self.rollout_logprob)

    def sum_over_sequence(self, values: Tensor) -> Tensor:
        """The sum of ``values`` [T] over the sequence of each token: float64 [T]."""
        return sequence_sum(values, self.sequence_index, self.sequence_count)[self.sequence_index]


@dataclass(frozen=True)
class Corrected:
    """What corrections make of tokens. Tensors are [T] and detached.

    Attributes:
        weight: multiplies each token's objective.
        masked: bool, tokens whose weight is 0 because something is outside its bounds.
        truncated: bool, tokens whose weight is at a bound instead of the ratio.
    """

    weight: Tensor
    masked: Tensor
    truncated: Tensor

    def __mul__(self, other: Corrected) -> Corrected:
        return Corrected(
            saturated(self.weight * other.weight), self.masked | other.masked, self.truncated | other.truncated
        )

    @classmethod
    def nothing(cls, tokens: SampledTokens) -> Corrected:
        """Weights of 1."""
        none = torch.zeros_like(tokens.sequence_index, dtype=torch.bool)
        return cls(torch.ones_like(tokens.logprob.detach()), none, none)


@dataclass(frozen=True)
class Correction:
    """A bound on what two policies say of a token or a sequence, and what happens outside.

    With d = ln pi - ln pi_rollout, each token is measured by its ratio e^d or by an estimate of
    KL(rollout || train): k1 = -d, k2 = d^2 / 2, k3 = e^d - 1 - d (Schulman, "Approximating KL Divergence", 2020). The
    measure of a sequence is e^(sum d) or the sum of an estimate (``sequence``), or e^(mean d), which is the geometric
    mean of its ratios, or the mean of an estimate (``geometric``).

    - ``truncate``: the weight is the ratio at this level, moved to the nearest bound.
    - ``mask``: the weight is 0 outside the bounds. Inside it is the ratio at this level, or 1 if the measure is not the
      ratio.
    - ``reject``: all tokens of a sequence have weight 0 if the measure of the sequence, or of any of its tokens with
      level ``token``, is outside the bounds. The others have weight 1.

    A measure at a bound is inside.
    """

    level: Level = "token"
    """Whether the measure is that of each token (``token``), of the product of a sequence's ratios (``sequence``) or of
    their geometric mean (``geometric``)."""
    action: Action = "truncate"
    """What happens outside the bounds: ``truncate``, ``mask`` or ``reject``."""
    measure: Measure = "ratio"
    """What is compared with the bounds: the ``ratio``, or an estimate of a KL divergence, ``k1``, ``k2`` or ``k3``."""
    floor: Bound | None = None
    """Lower bound; null sets none."""
    cap: Bound | None = None
    """Upper bound; null sets none."""
    policy: Policy = "old"
    """Whether pi is the policy before the step's updates (``old``) or that of each update (``current``)."""
    advantages: Advantages = "any"
    """Whether sequences of any advantage are corrected, or only those with a ``negative`` one."""

    def __post_init__(self) -> None:
        for name, choices in (
            *(("level", Level), ("action", Action), ("measure", Measure)),
            *(("policy", Policy), ("advantages", Advantages)),
        ):
            value = getattr(self, name)
            if value not in get_args(choices):
                raise ValueError(f"importance {name}: unknown {value!r}; valid: {', '.join(get_args(choices))}")
        check_bounds(self, "importance weights")
        equal = 1.0 if self.measure == "ratio" else 0.0  # the measure of equal policies must be inside
        if self.floor is None and self.cap is None:
            raise ValueError("importance weights: neither floor nor cap bounds them; set one, for example cap=2.0")
        if self.cap is not None and self.cap < equal:
            raise ValueError(f"importance weights: cap must be at least {equal:g}, found {self.cap!r}")
        if self.floor is not None and (self.floor > equal or (self.measure == "ratio" and self.floor < 0)):
            allowed = "in [0, 1]" if self.measure == "ratio" else "at most 0"
            raise ValueError(f"importance weights: floor must be {allowed}, found {self.floor!r}")
        if self.floor is not None and self.measure in ("k2", "k3"):
            raise ValueError(f"importance weights: {self.measure} is never negative and takes no floor, only cap")
        if self.action == "truncate" and self.measure != "ratio":
            raise ValueError(
                f"importance weights: only a ratio can be truncated; with {self.measure} use mask or reject"
            )

    @property
    def is_filter(self) -> bool:
        """Whether the weights inside the bounds are 1, so that they correct no bias."""
        return self.action == "reject" or self.measure != "ratio"

    def __call__(self, tokens: SampledTokens, total: Total = of_this_process) -> Corrected:
        """The weights of ``tokens``; nothing is summed over processes, because sequences are whole."""
        log_ratio = tokens.log_ratio()
        value = self._measure(tokens, log_ratio.double())
        concerned = tokens.advantage < 0 if self.advantages == "negative" else torch.ones_like(value, dtype=torch.bool)
        low = -math.inf if self.floor is None else self.floor
        high = math.inf if self.cap is None else self.cap
        outside = ~((value >= low) & (value <= high)) & concerned
        weight = torch.ones_like(value)
        if not self.is_filter:
            weight = torch.where(concerned, value.clamp(low, high) if self.action == "truncate" else value, 1.0)
        if self.action == "truncate":
            return Corrected(saturated(weight, log_ratio.dtype), torch.zeros_like(outside), outside)
        if self.action == "reject":
            outside = tokens.sum_over_sequence(outside) > 0
        weight = saturated(weight.masked_fill(outside, 0.0), log_ratio.dtype)
        return Corrected(weight, outside, torch.zeros_like(outside))

    def _measure(self, tokens: SampledTokens, log_ratio: Tensor) -> Tensor:
        """The measure of each token or of its sequence: float64 [T]."""
        value = log_ratio
        if self.measure == "k1":
            value = -log_ratio
        elif self.measure == "k2":
            value = log_ratio.square() / 2
        elif self.measure == "k3":
            log_ratio = log_ratio.clamp(max=700.0)  # e^700 fits float64
            value = log_ratio.expm1() - log_ratio
        if self.level != "token":
            sums = tokens.sum_over_sequence(value)
            lengths = tokens.sum_over_sequence(torch.ones_like(value))
            value = sums / lengths if self.level == "geometric" else sums
        return value.clamp(max=LARGEST_LOG_WEIGHT).exp() if self.measure == "ratio" else value


@dataclass(frozen=True)
class SecondMoment:
    """M2PO: leave out the tokens of largest (ln r)^2 until the mean over the others is at most ``cap``.

    r = pi / pi_rollout. Only tokens in PPO's trust region count and can be left out: those with A > 0 and r > 1, or
    A < 0 and r < 1. The mean is over the minibatch, of all processes. A token that is kept has the weight r. Tokens
    with the same (ln r)^2 are left out together. Source: arXiv 2510.01161, algorithm 1 and equation 5.
    """

    cap: Annotated[float, Within(0.0)] = 0.04
    """Largest mean of (ln r)^2 over the trust-region tokens that are kept."""

    policy = "old"
    is_filter = False

    def __post_init__(self) -> None:
        check_bounds(self, "importance weights")
        if self.cap is None:  # text in parentheses may say so
            raise ValueError("importance weights: m2po needs a cap; write for example m2po(cap=0.04)")

    def __call__(self, tokens: SampledTokens, total: Total = of_this_process) -> Corrected:
        """The weights of ``tokens``: a minibatch, or this process's share of one; ``total`` sums over its processes."""
        log_ratio = tokens.log_ratio()
        moment = log_ratio.double().square()
        in_region = tokens.advantage * log_ratio.sign() > 0
        cut = largest_cut(moment[in_region], lambda count, sums: sums <= self.cap * count, total)
        masked = in_region & ~(moment <= cut)
        ratio = log_ratio.double().clamp(max=LARGEST_LOG_WEIGHT).exp()
        return Corrected(saturated(ratio.masked_fill(masked, 0.0), log_ratio.dtype), masked, torch.zeros_like(masked))


@dataclass(frozen=True)
class ImportanceWeights:
    """The product of several corrections.

    Attributes:
        corrections: at least one.
    """

    corrections: tuple[Correction | SecondMoment, ...]

    @property
    def follow_updates(self) -> bool:
        """Whether a weight depends on the policy of each update and not only on that before the step."""
        return any(correction.policy == "current" for correction in self.corrections)

    @property
    def weigh(self) -> bool:
        """Whether a correction weighs tokens by the ratio instead of only leaving some out."""
        return self.weighing > 0

    @property
    def weighing(self) -> int:
        """Number of corrections that weigh tokens by the ratio; with two, a weight is about its square."""
        return sum(not correction.is_filter for correction in self.corrections)

    def before_updates(self, tokens: SampledTokens, total: Total = of_this_process) -> Corrected:
        """The corrections that do not follow updates; ``tokens.logprob`` is that of the policy before the step."""
        return _product((c for c in self.corrections if c.policy == "old"), tokens, total)

    def during_update(self, tokens: SampledTokens) -> Corrected:
        """The corrections that follow updates; ``tokens.logprob`` is that of the current policy."""
        return _product((c for c in self.corrections if c.policy == "current"), tokens, of_this_process)


def _product(corrections: Iterable[Correction | SecondMoment], tokens: SampledTokens, total: Total) -> Corrected:
    result = Corrected.nothing(tokens)
    for correction in corrections:
        result = result * correction(tokens, total)
    return result
