"""Clip schedules: the thresholds of a step as a function of the run's progress and of the measured entropy.

Every schedule is used the same way, once a step and before any update of that step::

    schedule.observe(step, entropy)        # the exact mean entropy of the policy, nats per token
    thresholds = schedule.thresholds(step)

Formulas: arXiv 2602.09782. With x = k / T the progress at step k of T and s the split,

    lambda = 1 - x / s  in the first phase (x < s),     lambda = -(x - s) / (1 - s)  in the second (x >= s),

which is 1 - 2 k / T for s = 1/2. The step at the split belongs to the second phase, so that a second phase which is to
start at the full lower threshold does. Steps run from 0 to T - 1; the formulas reach their end at k = T and stay there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

from megatron_rlvr.control.steering import SteeringResponse
from megatron_rlvr.control.thresholds import AffineThreshold, ClipThresholds


class ClipSchedule:
    """What every schedule does: observe the entropy, give thresholds, and keep its state in a checkpoint."""

    name: ClassVar[str]

    def observe(
        self,
        step: int,
        entropy: float,
        *,
        tokens: int | None = None,
        response: SteeringResponse | None = None,
        standard_error: float | None = None,
        rate: float = 1.0,
    ) -> None:
        """Take in the mean entropy (nats per token) measured before the updates of ``step``.

        ``tokens`` is the number of response tokens trained on before this step; needed only when progress is counted
        in tokens. ``response`` (what steering would do to this step's tokens), ``standard_error`` (of ``entropy``,
        nats) and ``rate`` (this step's learning rate relative to its peak, 0 to 1) help :class:`TargetEntropy`; the
        other schedules ignore them.
        Raises ValueError when ``step`` is negative or ``entropy`` is no finite, non-negative number.
        """
        check_observation(step, entropy)

    @property
    def wants_updates(self) -> bool:
        """Whether :meth:`observe_update` does anything, so that a trainer may spare itself the measurement."""
        return False

    def observe_update(self, step: int, index: int, count: int, shift: float | None) -> None:
        """Take in what update ``index`` (from 0) of the ``count`` of ``step`` saw; then ask for the thresholds anew.

        ``shift`` is the change of ln entropy that the step's earlier updates made at the states of this one's tokens:
        ln of their mean entropy in this update's forward pass over that before the step; None where there was none. It
        must be the same on every rank. Calling it is optional: without it a step keeps the steering that it began with.
        """

    def thresholds(self, step: int) -> ClipThresholds:
        """The thresholds of ``step``, from now on. Raises ValueError when ``step`` is negative."""
        raise NotImplementedError

    def metrics(self) -> dict[str, float]:
        """What the schedule knows beyond the thresholds, as step metrics named ``control/*``."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """The state that a checkpoint must hold: plain numbers, lists and strings."""
        return {"schedule": self.name}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`. Raises ValueError when the state is another schedule's."""
        if state.get("schedule") != self.name:
            raise ValueError(
                f"schedule state: this run is configured for '{self.name}', the checkpoint holds "
                f"'{state.get('schedule')}'; use the checkpoint's schedule or start a new run"
            )


@dataclass
class Constant(ClipSchedule):
    """The same thresholds at every step: static clipping, and with an upper intercept of 0.28 DAPO's clip-higher."""

    name: ClassVar[str] = "constant"
    lower_intercept: float = 0.2
    lower_slope: float = 0.0
    upper_intercept: float = 0.2
    upper_slope: float = 0.0

    def __post_init__(self) -> None:
        self.thresholds(0)

    def thresholds(self, step: int) -> ClipThresholds:
        check_step(step)
        return ClipThresholds(
            AffineThreshold(self.lower_intercept, self.lower_slope),
            AffineThreshold(self.upper_intercept, self.upper_slope),
        )


@dataclass
class DynamicSchedule(ClipSchedule):
    """What the dynamic schedules share: the dynamic thresholds H and M, the static one eps, and the progress.

    Progress is counted in steps, or in response tokens when ``total_tokens`` is given; then ``observe`` must be told
    how many tokens have been trained on. Defaults are those of arXiv 2602.09782.
    """

    total_steps: int
    eps: float = 0.2
    upper_intercept: float = 0.5
    upper_slope: float = -0.25
    lower_intercept: float = 0.3
    lower_slope: float = -0.13
    total_tokens: int | None = None
    _tokens: int | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        check_count(self.name, "total_steps", self.total_steps)
        if self.total_tokens is not None:
            check_count(self.name, "total_tokens", self.total_tokens)
        check_inside(self.name, "eps", self.eps, 0.0, 1.0)
        # Impossible values are refused here, in one line; every mixture of possible thresholds is possible again.
        ClipThresholds(self.lower, self.upper)

    @property
    def static(self) -> AffineThreshold:
        """eps, as an affine threshold."""
        return AffineThreshold(self.eps)

    @property
    def upper(self) -> AffineThreshold:
        """H(p), the dynamic upper threshold."""
        return AffineThreshold(self.upper_intercept, self.upper_slope)

    @property
    def lower(self) -> AffineThreshold:
        """M(p), the dynamic lower threshold."""
        return AffineThreshold(self.lower_intercept, self.lower_slope)

    def observe(
        self,
        step: int,
        entropy: float,
        *,
        tokens: int | None = None,
        response: SteeringResponse | None = None,
        standard_error: float | None = None,
        rate: float = 1.0,
    ) -> None:
        check_observation(step, entropy)
        if self.total_tokens is not None:
            if tokens is None:
                raise ValueError(f"{self.name}: progress is counted in tokens, so observe() needs tokens=...")
            self._tokens = tokens

    def progress(self, step: int) -> float:
        """x = k / T, from 0 to 1; steps or tokens past the end stay at 1."""
        check_step(step)
        if self.total_tokens is None:
            return min(step / self.total_steps, 1.0)
        if self._tokens is None:
            raise ValueError(f"{self.name}: progress is counted in tokens; call observe() before asking for it")
        return min(self._tokens / self.total_tokens, 1.0)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "tokens": self._tokens}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._tokens = state["tokens"]


@dataclass
class TwoPhaseSchedule(DynamicSchedule):
    """A dynamic schedule of two phases; ``split`` is where the second begins, as a share of the run."""

    split: float = 0.5

    def __post_init__(self) -> None:
        check_inside(self.name, "split", self.split, 0.0, 1.0)
        super().__post_init__()

    def phase(self, step: int) -> tuple[bool, float]:
        """(whether ``step`` is in the first phase, lambda): lambda falls 1 -> 0 in the first, 0 -> -1 in the second."""
        x = self.progress(step)
        if x < self.split:
            return True, 1.0 - x / self.split
        return False, -(x - self.split) / (1.0 - self.split)


@dataclass
class IncreaseThenDecrease(TwoPhaseSchedule):
    """ID: raise entropy by a relaxed upper threshold that decays, then lower it by a tight lower one that decays.

    First phase: upper = lambda H + (1 - lambda) eps, lower = eps.
    Second phase: upper = eps, lower = (1 + lambda) M - lambda eps.
    """

    name: ClassVar[str] = "increase-then-decrease"

    def thresholds(self, step: int) -> ClipThresholds:
        first, lam = self.phase(step)
        if first:
            return ClipThresholds(lower=self.static, upper=self.upper.combine(lam, self.static, 1.0 - lam))
        return ClipThresholds(lower=self.lower.combine(1.0 + lam, self.static, -lam), upper=self.static)


@dataclass
class DecreaseIncreaseDecrease(TwoPhaseSchedule):
    """DID: start static, relax the upper threshold to H by the split and keep it, and let the lower one decay from M.

    First phase: upper = lambda eps + (1 - lambda) H, lower = eps.
    Second phase: upper = H, lower = (1 + lambda) M - lambda eps.
    """

    name: ClassVar[str] = "decrease-increase-decrease"

    def thresholds(self, step: int) -> ClipThresholds:
        first, lam = self.phase(step)
        if first:
            return ClipThresholds(lower=self.static, upper=self.static.combine(lam, self.upper, 1.0 - lam))
        return ClipThresholds(lower=self.lower.combine(1.0 + lam, self.static, -lam), upper=self.upper)


@dataclass
class OscillatoryDecay(DynamicSchedule):
    """OD: let entropy swing inside a band whose upper edge comes down to its lower edge.

    H_min = ``floor`` * H_init, tau_low = H_min, tau_high(k) = H_min + (H_init - H_min) (1 - k / T). An entropy at or
    below tau_low switches to raising (upper = H, lower = eps), one above tau_high to lowering (upper = eps, lower = M);
    between them the state stays. It starts lowering. ``initial_entropy`` (nats) is measured at step 0 unless given.
    """

    name: ClassVar[str] = "oscillatory-decay"
    initial_entropy: float | None = None
    floor: float = 0.2
    _raising: bool = field(default=False, init=False, repr=False)
    _band: tuple[float, float] | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_inside(self.name, "floor", self.floor, 0.0, 1.0)
        if self.initial_entropy is not None:
            check_inside(self.name, "initial_entropy", self.initial_entropy, 0.0, math.inf)

    def observe(
        self,
        step: int,
        entropy: float,
        *,
        tokens: int | None = None,
        response: SteeringResponse | None = None,
        standard_error: float | None = None,
        rate: float = 1.0,
    ) -> None:
        super().observe(step, entropy, tokens=tokens)
        if self.initial_entropy is None:
            self.initial_entropy = first_entropy(self.name, step, entropy)
        low = self.floor * self.initial_entropy
        high = low + (self.initial_entropy - low) * (1.0 - self.progress(step))
        self._band = (low, high)
        if entropy <= low:
            self._raising = True
        elif entropy > high:
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
        return {**super().state_dict(), "initial_entropy": self.initial_entropy, "raising": self._raising}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.initial_entropy, self._raising = state["initial_entropy"], state["raising"]


def first_entropy(name: str, step: int, entropy: float) -> float:
    """The entropy that later ones are measured against; refuses to take it from the middle of a run."""
    if step != 0:
        raise ValueError(
            f"{name}: the initial entropy is measured at step 0, but the first observation is of step {step}; "
            "load the schedule's state from the checkpoint, or give initial_entropy"
        )
    if not entropy > 0.0:
        raise ValueError(f"{name}: the initial entropy must be above 0, measured {entropy!r}")
    return float(entropy)


def check_step(step: int) -> None:
    if step < 0:
        raise ValueError(f"schedule: step must not be negative, found {step}")


def check_observation(step: int, entropy: float) -> None:
    check_step(step)
    if not (math.isfinite(entropy) and entropy >= 0.0):
        raise ValueError(f"schedule: the entropy of step {step} must be finite and not negative, found {entropy!r}")


def check_inside(name: str, parameter: str, value: object, low: float, high: float) -> None:
    """Refuse a ``value`` that is no number inside the open interval (low, high)."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low < value < high:
        raise ValueError(f"{name}: {parameter} must be a number inside ({low:g}, {high:g}), found {value!r}")


def check_count(name: str, parameter: str, value: object) -> None:
    """Refuse a ``value`` that is no whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}: {parameter} must be a whole number of at least 1, found {value!r}")
