"""Clip schedules: the thresholds of each step, from the progress of the run and the measured entropy.

All schedules are used in the same way, once per step and before its updates::

    schedule.observe(step, entropy)        # the exact mean entropy of the policy, in nats per token
    thresholds = schedule.thresholds(step)

The forms of the schedules are those of arXiv 2602.09782. With x = k / T the progress at step k of T and s the split,

    lambda = 1 - x / s  in the first phase (x <= s),     lambda = -(x - s) / (1 - s)  in the second (x > s),

which is 1 - 2 k / T for s = 1/2. The step at the split belongs to the first phase, as in the paper. Steps run from 0 to
T - 1. The formulas reach their end at k = T and stay there.

The default numbers of the dynamic thresholds (upper 0.5 - 0.25 p, lower 0.3 - 0.13 p) are not in the paper. They come
from a public launch script of other users of the method (Tencent, IterSynth).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

from megatron_rlvr.control.base import ClipSchedule, Observation, check_step
from megatron_rlvr.control.bounds import ThresholdParameter, Within, check_bounds
from megatron_rlvr.control.thresholds import AffineThreshold, ClipThresholds


@dataclass
class Constant(ClipSchedule):
    """The same thresholds at every step: static clipping, or DAPO's clip-higher with an upper intercept of 0.28."""

    name: ClassVar[str] = "constant"
    lower_intercept: ThresholdParameter = 0.2
    """Lower threshold for a token of probability 0."""
    lower_slope: ThresholdParameter = 0.0
    """Change of the lower threshold from probability 0 to 1."""
    upper_intercept: ThresholdParameter = 0.2
    """Upper threshold for a token of probability 0."""
    upper_slope: ThresholdParameter = 0.0
    """Change of the upper threshold from probability 0 to 1."""

    def __post_init__(self) -> None:
        self.thresholds(0)  # raises ValueError for impossible values

    def thresholds(self, step: int) -> ClipThresholds:
        check_step(step)
        return ClipThresholds(
            AffineThreshold(self.lower_intercept, self.lower_slope),
            AffineThreshold(self.upper_intercept, self.upper_slope),
        )


@dataclass
class DynamicSchedule(ClipSchedule):
    """Base class of the dynamic schedules: the thresholds eps, H and M that they mix, and the progress of the run."""

    total_steps: Annotated[int, Within(1, includes_low=True, cap=2**31 - 1)]
    """T, the steps of the run."""
    eps: Annotated[float, Within(0.0, 1.0)] = 0.2
    """The static threshold."""
    upper_intercept: ThresholdParameter = 0.5
    """Dynamic upper threshold H(p) at p = 0. This default and the next three are those of a public launch script of
    other users of the method (Tencent/IterSynth); the paper does not state numbers."""
    upper_slope: ThresholdParameter = -0.25
    """Slope of H(p)."""
    lower_intercept: ThresholdParameter = 0.3
    """Dynamic lower threshold M(p) at p = 0."""
    lower_slope: ThresholdParameter = -0.13
    """Slope of M(p)."""
    smallest_threshold: Annotated[float, Within(0.0, 1.0)] | None = None
    """Clamp eps, H(p) and M(p) from below, at p = 0 and p = 1 and so in between; null: no limit."""
    largest_threshold: Annotated[float, Within(0.0)] | None = None
    """The same from above. The launch script from which the numbers of H and M come uses 0.05 and 0.6."""
    total_tokens: Annotated[int, Within(1, includes_low=True, cap=2**62)] | None = None
    """Count progress in response tokens, of which the run has this many; null counts it in steps."""
    _tokens: int | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        check_bounds(self, self.name)
        low, high = self._limits
        if low > high:
            raise ValueError(f"{self.name}: smallest_threshold must be at most largest_threshold, found {low} > {high}")
        # Every mixture of possible thresholds is possible, so checking the unmixed ones once is enough.
        ClipThresholds(self.lower, self.upper)

    @property
    def _limits(self) -> tuple[float, float]:
        low, high = self.smallest_threshold, self.largest_threshold
        return (-math.inf if low is None else low, math.inf if high is None else high)

    @property
    def static(self) -> AffineThreshold:
        """eps as an affine threshold."""
        return AffineThreshold(self.eps).within(*self._limits)

    @property
    def upper(self) -> AffineThreshold:
        """H(p), the dynamic upper threshold."""
        return AffineThreshold(self.upper_intercept, self.upper_slope).within(*self._limits)

    @property
    def lower(self) -> AffineThreshold:
        """M(p), the dynamic lower threshold."""
        return AffineThreshold(self.lower_intercept, self.lower_slope).within(*self._limits)

    def _observe(self, observation: Observation) -> None:
        if self.total_tokens is not None:
            if observation.tokens is None:
                raise ValueError(f"{self.name}: progress is counted in tokens, so observe() needs tokens=...")
            self._tokens = observation.tokens

    def progress(self, step: int) -> float:
        """x = k / T, from 0 to 1. Steps or tokens past the end stay at 1."""
        check_step(step)
        if self.total_tokens is None:
            return min(step / self.total_steps, 1.0)
        if self._tokens is None:
            raise ValueError(f"{self.name}: progress is counted in tokens, so call observe() first")
        return min(self._tokens / self.total_tokens, 1.0)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "tokens": self._tokens}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._tokens = state["tokens"]


@dataclass
class TwoPhaseSchedule(DynamicSchedule):
    """Base class of the schedules with two phases.

    First phase: upper = lambda A + (1 - lambda) B, lower = eps, with A and B of :meth:`upper_ends`.
    Second phase: upper = B, lower = (1 + lambda) M - lambda eps.
    """

    split: Annotated[float, Within(0.0, 1.0)] = 0.5
    """Progress at which the first phase ends, as a fraction of the run."""

    def upper_ends(self) -> tuple[AffineThreshold, AffineThreshold]:
        """The upper threshold at the start and at the end of the first phase."""
        raise NotImplementedError

    def phase(self, step: int) -> tuple[bool, float]:
        """(whether ``step`` is in the first phase, lambda). Lambda falls from 1 to 0 at the split, and then to -1."""
        x = self.progress(step)
        if x <= self.split:
            return True, 1.0 - x / self.split
        return False, -(x - self.split) / (1.0 - self.split)

    def thresholds(self, step: int) -> ClipThresholds:
        first, lam = self.phase(step)
        start, end = self.upper_ends()
        if first:
            return ClipThresholds(lower=self.static, upper=start.combine(lam, end, 1.0 - lam))
        return ClipThresholds(lower=self.lower.combine(1.0 + lam, self.static, -lam), upper=end)


@dataclass
class IncreaseThenDecrease(TwoPhaseSchedule):
    """ID: a relaxed upper threshold that decays raises entropy first, then a tight lower one that decays lowers it.

    First phase: upper = lambda H + (1 - lambda) eps, lower = eps.
    Second phase: upper = eps, lower = (1 + lambda) M - lambda eps.
    Source: arXiv 2602.09782.
    """

    name: ClassVar[str] = "increase-then-decrease"

    def upper_ends(self) -> tuple[AffineThreshold, AffineThreshold]:
        return self.upper, self.static


@dataclass
class DecreaseIncreaseDecrease(TwoPhaseSchedule):
    """DID: the upper threshold relaxes from eps to H in the first phase and stays; in the second, the lower one decays.

    First phase: upper = lambda eps + (1 - lambda) H, lower = eps.
    Second phase: upper = H, lower = (1 + lambda) M - lambda eps.
    Source: arXiv 2602.09782.
    """

    name: ClassVar[str] = "decrease-increase-decrease"

    def upper_ends(self) -> tuple[AffineThreshold, AffineThreshold]:
        return self.static, self.upper


@dataclass
class RelativeSchedule(DynamicSchedule):
    """Base class of the schedules that compare the entropy to its value at the start of the run."""

    initial_entropy: Annotated[float, Within(0.0)] | None = None
    """H_init in nats per token; null takes the entropy measured at step 0."""

    def _observe(self, observation: Observation) -> None:
        super()._observe(observation)
        if self.initial_entropy is not None:
            return
        if observation.step != 0:
            raise ValueError(
                f"{self.name}: the initial entropy is measured at step 0, but the first observation is of step "
                f"{observation.step}; load the schedule's state from the checkpoint, or set initial_entropy"
            )
        if not observation.entropy > 0.0:
            raise ValueError(f"{self.name}: the initial entropy must be above 0, measured {observation.entropy!r}")
        self.initial_entropy = float(observation.entropy)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "initial_entropy": self.initial_entropy}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        if self.initial_entropy is None:
            self.initial_entropy = state["initial_entropy"]


@dataclass
class OscillatoryDecay(RelativeSchedule):
    """OD: entropy oscillates in a band whose upper edge descends to its lower edge.

    With H_min = ``floor`` * H_init, the edges are tau_low = H_min and tau_high = H_min + (H_init - H_min) (1 - k / T).
    An entropy at or below tau_low switches to raising (upper = H, lower = eps), an entropy above tau_high to lowering
    (upper = eps, lower = M). In between the state stays. A run begins by lowering. Source: arXiv 2602.09782.
    """

    name: ClassVar[str] = "oscillatory-decay"
    floor: Annotated[float, Within(0.0, 1.0)] = 0.2
    """H_min as a fraction of the initial entropy."""
    _raising: bool = field(default=False, init=False, repr=False)
    _band: tuple[float, float] | None = field(default=None, init=False, repr=False)

    def _observe(self, observation: Observation) -> None:
        super()._observe(observation)
        assert self.initial_entropy is not None
        low = self.floor * self.initial_entropy
        high = low + (self.initial_entropy - low) * (1.0 - self.progress(observation.step))
        self._band = (low, high)
        if observation.entropy <= low:
            self._raising = True
        elif observation.entropy > high:
            self._raising = False

    def thresholds(self, step: int) -> ClipThresholds:
        check_step(step)
        if self._raising:
            return ClipThresholds(lower=self.static, upper=self.upper)
        return ClipThresholds(lower=self.lower, upper=self.static)

    def metrics(self) -> dict[str, float]:
        if self._band is None:
            return {}
        return {
            "control/raising": float(self._raising),
            "control/band_low": self._band[0],
            "control/band_high": self._band[1],
        }

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "raising": self._raising}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._raising = state["raising"]
