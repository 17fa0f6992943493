"""What region steering would do to the tokens of a step, in the four sums that all ranks add up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class SteeringResponse:
    """The first-order entropy change of a step as a function of the steering u.

    With token weights (1 + u s) / (1 + u nu), s in [-1, 1] the steering direction of a token, c its entropy change and
    n its ascent (see :mod:`~megatron_rlvr.control.regions`), the change is proportional to the *drive*

        f(u) = (b + u) / (1 + u nu),     b = sum c / sum c s,     nu = sum n s / sum n.

    b is the steering that the unsteered step is worth: below 0 when the step lowers entropy by itself. ``change`` is
    sum c and ``slope`` sum c s, both in nats per unit of learning rate; ``ascent`` is sum n, ``ascent_slope`` sum n s.
    """

    change: float
    slope: float
    ascent: float
    ascent_slope: float

    @classmethod
    def from_sums(cls, sums: Sequence[float]) -> SteeringResponse:
        """From the four sums of :func:`~megatron_rlvr.control.regions.steering_sums`, added over all ranks."""
        change, slope, ascent, ascent_slope = (float(x) for x in sums)
        return cls(change, slope, ascent, ascent_slope)

    @property
    def has_authority(self) -> bool:
        """Whether any token's weight can change entropy: not in a step without gradient."""
        return self.slope > 0.0 and self.ascent > 0.0

    @property
    def imbalance(self) -> float:
        """nu: the share of the ascent on entropy-raising tokens minus that on lowering ones, in [-1, 1]."""
        return self.ascent_slope / self.ascent if self.ascent > 0.0 else 0.0

    def normaliser(self, steering: float) -> float:
        """1 + u nu, by which the weights are divided so that the ascent stays what it was."""
        return 1.0 + steering * self.imbalance

    def predicted(self, steering: float) -> float:
        """The first-order entropy change under ``steering``, in nats per unit of learning rate."""
        return (self.change + steering * self.slope) / self.normaliser(steering)

    def drive(self, steering: float) -> float:
        """f(u); 0 in a step without gradient."""
        return self.predicted(steering) / self.slope if self.has_authority else 0.0

    def steering_for(self, drive: float, limit: float) -> float:
        """The u in [-limit, limit] whose drive is ``drive``, or the nearest to it."""
        if not self.has_authority or self.drive(limit) <= self.drive(-limit):
            return 0.0
        if drive >= self.drive(limit):
            return limit
        if drive <= self.drive(-limit):
            return -limit
        return (drive - self.change / self.slope) / (1.0 - drive * self.imbalance)


NEUTRAL = SteeringResponse(change=0.0, slope=1.0, ascent=1.0, ascent_slope=0.0)
"""The response assumed where none is measured: the drive is u itself."""
