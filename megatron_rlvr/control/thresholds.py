"""Clip thresholds that are affine in a token's probability, and the ratio bounds that follow from them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class AffineThreshold:
    """A clip threshold eps(p) = intercept + slope * p of the token's probability p (arXiv 2602.09782).

    Callable on floats and tensors. Raises ValueError if a parameter is not a finite number. Which values are possible
    depends on the side of the threshold, so :class:`ClipThresholds` checks that.
    """

    intercept: float = 0.2
    slope: float = 0.0

    def __post_init__(self) -> None:
        for name in ("intercept", "slope"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise ValueError(f"clip threshold: {name} must be a finite number, found {value!r}")

    def __call__(self, prob: Any) -> Any:
        return self.intercept + self.slope * prob

    def within(self, low: float, high: float) -> AffineThreshold:
        """The threshold between ``low`` and ``high`` for every p in [0, 1]: its values at both ends are clamped.

        It stays affine, so four scalars still describe the thresholds of a step.
        """
        at_0, at_1 = (min(max(self(p), low), high) for p in (0.0, 1.0))
        return self if (at_0, at_1) == (self(0.0), self(1.0)) else AffineThreshold(at_0, at_1 - at_0)

    def combine(self, weight: float, other: AffineThreshold, other_weight: float) -> AffineThreshold:
        """``weight * self + other_weight * other``: affine again, so slope and intercept are combined first."""
        return AffineThreshold(
            intercept=weight * self.intercept + other_weight * other.intercept,
            slope=weight * self.slope + other_weight * other.slope,
        )


@dataclass(frozen=True)
class ClipThresholds:
    """The control of one optimisation step: two affine thresholds and the region-steering scalar u.

    These five scalars must be the same on every rank. ``steering`` is u in (-1, 1); 0 means plain clipping. A number
    eps for a threshold stands for ``AffineThreshold(eps)``.

    Raises ValueError if a threshold is impossible for some probability in [0, 1]:

    - ``lower`` must stay inside (0, 1). At 0 or below, a token at ratio 1 would already be clipped. At 1 or above, the
      bound on the ratio is not positive and never acts.
    - ``upper`` must stay above 0 for the same reason, and its slope below 1, where the closed form has a pole. The
      threshold itself may exceed 1: a ratio bound of 4 for unlikely tokens (slope -2.8, intercept 3.0) is usable.
    """

    lower: AffineThreshold = field(default_factory=AffineThreshold)
    upper: AffineThreshold = field(default_factory=AffineThreshold)
    steering: float = 0.0

    @classmethod
    def static(cls, lower: float = 0.2, upper: float | None = None) -> ClipThresholds:
        """The thresholds of PPO and GRPO: ratio bounds 1 - lower and 1 + upper; ``upper`` None means ``lower``.

        ``static(0.2, 0.28)`` is clip-higher (DAPO, arXiv 2503.14476).
        """
        return cls(AffineThreshold(lower), AffineThreshold(lower if upper is None else upper))

    def without_steering(self) -> ClipThresholds:
        """The same thresholds with steering 0, for an objective that clips and does not steer."""
        return ClipThresholds(self.lower, self.upper)

    def __post_init__(self) -> None:
        for side in ("lower", "upper"):
            threshold = getattr(self, side)
            if isinstance(threshold, int | float):
                object.__setattr__(self, side, AffineThreshold(threshold))
            elif not isinstance(threshold, AffineThreshold):
                raise ValueError(f"{side} clip threshold: must be a number or an AffineThreshold, found {threshold!r}")
        for prob in (0.0, 1.0):  # affine: if both ends are inside, everything between is
            if not 0.0 < self.lower(prob) < 1.0:
                raise ValueError(
                    f"lower clip threshold: must stay inside (0, 1), found {self.lower(prob):g} at p = {prob:g} "
                    f"(intercept {self.lower.intercept:g}, slope {self.lower.slope:g}); "
                    "choose 0 < intercept < 1 and 0 < intercept + slope < 1"
                )
            if not self.upper(prob) > 0.0:
                raise ValueError(
                    f"upper clip threshold: must stay above 0, found {self.upper(prob):g} at p = {prob:g} "
                    f"(intercept {self.upper.intercept:g}, slope {self.upper.slope:g}); "
                    "choose intercept > 0 and intercept + slope > 0"
                )
        if not self.upper.slope < 1.0:
            raise ValueError(
                f"upper clip threshold: slope must be below 1 (beyond it the ratio is unbounded), "
                f"found {self.upper.slope:g}"
            )
        if not -1.0 < self.steering < 1.0:
            raise ValueError(f"steering: must be inside (-1, 1), found {self.steering!r}")

    def ratio_bounds(self, old_prob: Any) -> tuple[Any, Any]:
        """The bounds (low, high) on the importance ratio of tokens whose old probability is ``old_prob``.

        The thresholds are functions of the *current* probability p = r * old_prob. Solving r <= 1 + upper(r * old_prob)
        and r >= 1 - lower(r * old_prob) for r gives bounds that do not depend on the current policy, so no gradient
        runs through a threshold:

            low = (1 - b_l) / (1 + a_l * old_prob),   high = (1 + b_u) / (1 - a_u * old_prob)

        with intercepts b and slopes a. ``old_prob`` is a float or a tensor of any shape; so are ``low`` and ``high``.
        Source: arXiv 2602.09782; the closed form is derived in docs/entropy_control/derivation.md.
        """
        low = (1.0 - self.lower.intercept) / (1.0 + self.lower.slope * old_prob)
        high = (1.0 + self.upper.intercept) / (1.0 - self.upper.slope * old_prob)
        return low, high

    def scalars(self) -> tuple[float, float, float, float, float]:
        """(upper slope, upper intercept, lower slope, lower intercept, steering), which every rank must share."""
        return (self.upper.slope, self.upper.intercept, self.lower.slope, self.lower.intercept, self.steering)

    @classmethod
    def from_scalars(cls, scalars: Sequence[float]) -> ClipThresholds:
        """The inverse of :meth:`scalars`."""
        upper_slope, upper_intercept, lower_slope, lower_intercept, steering = (float(x) for x in scalars)
        return cls(
            AffineThreshold(lower_intercept, lower_slope), AffineThreshold(upper_intercept, upper_slope), steering
        )

    def metrics(self) -> dict[str, float]:
        """The step metrics ``clip/upper_slope`` .. ``clip/lower_intercept``."""
        names = ("clip/upper_slope", "clip/upper_intercept", "clip/lower_slope", "clip/lower_intercept")
        return dict(zip(names, self.scalars(), strict=False))
