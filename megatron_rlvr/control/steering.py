"""How region steering changes the entropy of a step, from four sums over its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class SteeringResponse:
    """The first-order entropy change of a step as a function of the steering u.

    Tokens have weights (1 + u s) / (1 + u nu). For each token, s in [-1, 1] is its steering direction, c its entropy
    change and n its ascent (see :mod:`~megatron_rlvr.control.regions`). The change is then proportional to the *drive*

        f(u) = (b + u) / (1 + u nu),     b = sum c / sum c s,     nu = sum n s / sum n.

    b is the steering that corresponds to the unsteered step: negative if the step lowers entropy by itself.

    Attributes:
        change: sum c, in nats per unit of learning rate.
        slope: sum c s, in nats per unit of learning rate.
        ascent: sum n.
        ascent_slope: sum n s.
    """

    change: float
    slope: float
    ascent: float
    ascent_slope: float

    @classmethod
    def from_sums(cls, sums: Sequence[float]) -> SteeringResponse:
        """Build it from the four sums of :func:`~megatron_rlvr.control.regions.steering_sums`, added over all ranks."""
        change, slope, ascent, ascent_slope = (float(x) for x in sums)
        return cls(change, slope, ascent, ascent_slope)

    @property
    def has_authority(self) -> bool:
        """Whether token weights can change entropy. They cannot in a step without gradient."""
        return self.slope > 0.0 and self.ascent > 0.0

    @property
    def imbalance(self) -> float:
        """nu in [-1, 1]: the share of the ascent on tokens that raise entropy minus that on tokens that lower it."""
        return self.ascent_slope / self.ascent if self.ascent > 0.0 else 0.0

    def normaliser(self, steering: float) -> float:
        """1 + u nu: dividing the weights by it preserves the ascent."""
        return 1.0 + steering * self.imbalance

    def predicted(self, steering: float) -> float:
        """The first-order entropy change under ``steering``, in nats per unit of learning rate."""
        return (self.change + steering * self.slope) / self.normaliser(steering)

    def drive(self, steering: float) -> float:
        """f(u), and 0 in a step without gradient."""
        return self.predicted(steering) / self.slope if self.has_authority else 0.0

    def steering_for(self, drive: float, limit: float) -> float:
        """The u in [-limit, limit] whose drive is ``drive``, or comes closest to it."""
        if not self.has_authority or self.drive(limit) <= self.drive(-limit):
            return 0.0
        if drive >= self.drive(limit):
            return limit
        if drive <= self.drive(-limit):
            return -limit
        return min(max((drive - self.change / self.slope) / (1.0 - drive * self.imbalance), -limit), limit)


NEUTRAL = SteeringResponse(change=0.0, slope=1.0, ascent=1.0, ascent_slope=0.0)
"""The response to assume before one is measured: the drive equals u."""
