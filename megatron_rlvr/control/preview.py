"""Preview: how far entropy should move in a step when the curve ahead asks for more than a step can do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

SWEEPS = 40
"""Sweeps of coordinate descent; ten steps ahead, the first move then has converged to 1e-3."""
LARGEST_ERROR = 2.0
"""Errors of ln entropy count as at most this, so that their exponentials stay within bounds."""


@dataclass(frozen=True)
class Reach:
    """The least and the largest change of ln entropy that the actuators can make."""

    low: float
    high: float

    def clip(self, change: float) -> float:
        """The change within reach that is closest to ``change``."""
        return min(max(change, self.low), self.high)

    def contains(self, change: float) -> bool:
        """Whether ``change`` is strictly within reach."""
        return self.low < change < self.high


def first_move(
    log_entropy: float, log_targets: Sequence[float], first: Reach, later: Reach, free: float | None = None
) -> float:
    """The change of ln entropy in the next step that follows the targets ahead best.

    Args:
        log_entropy: present ln entropy.
        log_targets: ln targets of the next steps.
        first, later: reach of the next step, and of each step after it.
        free: if given, the targets are a floor: only entropy below a target is an error, and ``free`` is the change of
            a step without control, from which the moves depart as late and as little as the floor allows.

    Returns:
        x_1 of the moves x within reach that minimise the sum of (H_j / target_j - 1)^2 over the steps j ahead, where
        ln H_j = log_entropy + x_1 + ... + x_j. If a step can meet its target, it does. A curve that is too steep is
        left early and met late, with the error on both sides of the slope.
    """
    reach = [first, *[later] * (len(log_targets) - 1)]
    moves, level = [], log_entropy
    for target, each in zip(log_targets, reach, strict=True):
        moves.append(each.clip(target - level if free is None else free))
        level += moves[-1]
    if free is None and all(each.contains(move) for each, move in zip(reach[1:], moves[1:], strict=True)):
        return moves[0]
    for _ in range(SWEEPS):
        for i in reversed(range(len(moves))):
            # A Newton step in x_i, which moves all later levels.
            level, slope, curvature = log_entropy + sum(moves[:i]), 0.0, 0.0
            for move, target in zip(moves[i:], log_targets[i:], strict=True):
                level += move
                ratio = math.exp(min(max(level - target, -LARGEST_ERROR), LARGEST_ERROR))
                if free is None or ratio < 1.0:
                    slope += ratio * (ratio - 1.0)
                    curvature += ratio * max(2.0 * ratio - 1.0, 0.5)
            if curvature:
                moves[i] = reach[i].clip(moves[i] - slope / curvature)
    return moves[0]
