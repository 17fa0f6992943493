"""The clip thresholds that operators accept, as four scalars, and the steering that goes with them."""

from __future__ import annotations

import math
from typing import Protocol, TypeAlias

from torch import Tensor


class Affine(Protocol):
    """A threshold intercept + slope * p."""

    @property
    def slope(self) -> float: ...
    @property
    def intercept(self) -> float: ...


class AffineThresholds(Protocol):
    """Any object with a lower and an upper clip threshold, such as ``megatron_rlvr.control.ClipThresholds``.

    If it also has a number ``steering`` that is not 0, the operators require the steering's token weights.
    """

    @property
    def upper(self) -> Affine: ...
    @property
    def lower(self) -> Affine: ...


Thresholds: TypeAlias = AffineThresholds | float | tuple[float, float]
"""Affine thresholds, one number for both sides, or (lower, upper)."""


def four_scalars(thresholds: Thresholds) -> tuple[float, float, float, float]:
    """(upper slope, upper intercept, lower slope, lower intercept) as floats.

    A number eps stands for the bounds 1 - eps and 1 + eps, a pair (lower, upper) for 1 - lower and 1 + upper. An
    infinite intercept turns clipping off on that side. Raises ValueError for anything else, for NaN, for numbers that
    are not above 0, and if the closed form of a bound has a pole at some probability in [0, 1].
    """
    if isinstance(thresholds, int | float):
        thresholds = (thresholds, thresholds)
    if isinstance(thresholds, tuple | list):
        return _plain(thresholds)
    upper, lower = getattr(thresholds, "upper", None), getattr(thresholds, "lower", None)
    if not all(hasattr(side, name) for side in (upper, lower) for name in ("slope", "intercept")):
        raise ValueError(
            f"thresholds: must be a number, a pair (lower, upper) or a ClipThresholds, found {thresholds!r}"
        )
    assert upper is not None and lower is not None
    scalars = float(upper.slope), float(upper.intercept), float(lower.slope), float(lower.intercept)
    if not -math.inf < scalars[0] < 1.0:
        raise ValueError(f"thresholds: the upper slope must be a number below 1, found {scalars[0]}")
    if not -1.0 < scalars[2] < math.inf:
        raise ValueError(f"thresholds: the lower slope must be a number above -1, found {scalars[2]}")
    if not (-math.inf <= scalars[1] <= math.inf and -math.inf <= scalars[3] <= math.inf):  # isnan cannot be traced
        raise ValueError(f"thresholds: the intercepts must be numbers, found {scalars[1]} and {scalars[3]}")
    return scalars


def _plain(pair: tuple[float, ...] | list[float]) -> tuple[float, float, float, float]:
    if len(pair) != 2 or not all(isinstance(x, int | float) and not isinstance(x, bool) and x > 0.0 for x in pair):
        raise ValueError(
            "thresholds: numbers must be above 0, as in 0.2 for the ratio bounds 0.8 and 1.2 or (0.2, 0.28) for 0.8 "
            f"and 1.28, found {pair!r}"
        )
    return 0.0, float(pair[1]), 0.0, float(pair[0])


def steered(thresholds: Thresholds, steering_weight: Tensor | None, weight: Tensor | None) -> Tensor | None:
    """The product of both weights; None for 1.

    Raises ValueError if the thresholds carry steering and ``steering_weight`` is None: the bounds alone would drop it.
    """
    steering = getattr(thresholds, "steering", 0.0)
    if steering_weight is None:
        if steering != 0.0:
            raise ValueError(
                f"thresholds: their steering is {steering:g}, which acts through token weights and not through bounds; "
                "pass steering_weight=tokens.steering_weights(thresholds), where tokens is a "
                "megatron_rlvr.control.StepTokens, or thresholds.without_steering() to clip alone"
            )
        return weight
    return steering_weight if weight is None else weight * steering_weight
