"""Preview: how entropy should be moved in a step when the curve ahead asks for more than a step can do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

SWEEPS = 40
"""Sweeps of coordinate descent; ten steps ahead, the first move then has converged to 1e-3. Their number is fixed, so
that rounding changes the result by rounding only: a threshold amplifies it a hundredfold."""
LARGEST_ERROR = 2.0
"""Errors of ln entropy count as at most this, so that their exponentials stay within bounds."""
EFFORT = 0.005
"""Cost of a change of the control between two steps, relative to an error of the same size."""


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


@dataclass(frozen=True)
class Shares:
    """How the optimizer's momentum divides a step between the control before it and its own.

    An update follows an average of the directions of all updates so far. Under a control v, constant over the step, and
    an average e before it, a step moves ln entropy by ``carried * e + own * v``, and ends with the average
    ``kept * e + (1 - kept) * v``. Without momentum, the three are 0, 1 and 0.
    """

    carried: float
    own: float
    kept: float

    @classmethod
    def of_updates(cls, kept: Sequence[float], count: int) -> Shares:
        """Those of consecutive updates, each of which keeps a part ``kept`` of the average; a step has ``count``."""
        carried, product = 0.0, 1.0
        for each in kept:
            product *= each
            carried += product
        return cls(carried / count, (len(kept) - carried) / count, product)


@dataclass(frozen=True)
class StepAhead:
    """A step of the plan.

    Attributes:
        target: ln of the target after it.
        free: change of ln entropy without any control.
        reach: of its control: the change of ln entropy, per step, once momentum has caught up.
        shares: how far momentum lets that control act within the step.
    """

    target: float
    free: float
    reach: Reach
    shares: Shares


def first_control(
    log_entropy: float, carried: float, steps: Sequence[StepAhead], natural: float | None = None
) -> tuple[float, float]:
    """The control of the next step that follows the targets ahead best.

    Args:
        log_entropy: present ln entropy.
        carried: the average of the control so far, which momentum keeps.
        steps: the next steps.
        natural: if given, the targets are a floor: only entropy below a target is an error, and ``natural`` is the
            control of a step without intervention, which the plan leaves as late and as little as the floor allows.

    Returns:
        v_1, and the change of ln entropy in the next step under it. v are the controls within reach that minimise the
        sum of (H_j / target_j - 1)^2 over the steps j ahead. If a step can meet its target, it does. A curve that is
        too steep is left early and met late, with the error on both sides of the slope. With momentum, the squared
        change of the control from step to step counts as well, ``EFFORT`` times.
    """
    effects = _effects(steps)
    levels, controls, average, exact = [], [], carried, natural is None
    level = log_entropy
    for step in steps:
        shares = step.shares
        level += step.free + shares.carried * average
        wanted = (step.target - level) / shares.own if natural is None else natural
        controls.append(step.reach.clip(wanted))
        exact &= not shares.kept and (len(controls) == 1 or step.reach.contains(wanted))
        level += shares.own * controls[-1]
        average = shares.kept * average + (1.0 - shares.kept) * controls[-1]
        levels.append(level)
    if not exact:
        _descend(controls, levels, steps, effects, carried, natural)
    first = steps[0]
    return controls[0], first.free + first.shares.carried * carried + first.shares.own * controls[0]


def _effects(steps: Sequence[StepAhead]) -> list[list[float]]:
    """The effect of the control of step i on the level after step i, i + 1, ..."""
    effects = []
    for i, own in enumerate(steps):
        level, average = own.shares.own, 1.0 - own.shares.kept
        row = [level]
        for later in steps[i + 1 :]:
            level += later.shares.carried * average
            average *= later.shares.kept
            row.append(level)
        effects.append(row)
    return effects


def _descend(
    controls: list[float],
    levels: list[float],
    steps: Sequence[StepAhead],
    effects: Sequence[Sequence[float]],
    carried: float,
    natural: float | None,
) -> None:
    """Minimise the cost over ``controls``, in place: a Newton step in each of them, from the last to the first."""
    count, effort = len(steps), EFFORT if steps[0].shares.kept else 0.0
    errors = [level - step.target for level, step in zip(levels, steps, strict=True)]
    for _ in range(SWEEPS):
        for i in reversed(range(count)):
            slope = curvature = 0.0
            for effect, error in zip(effects[i], errors[i:], strict=True):
                ratio = math.exp(error) if abs(error) < LARGEST_ERROR else math.exp(math.copysign(LARGEST_ERROR, error))
                if natural is None or ratio < 1.0:
                    pull = effect * ratio
                    slope += pull * (ratio - 1.0)
                    curvature += effect * pull * (2.0 * ratio - 1.0 if ratio > 0.75 else 0.5)
            if not curvature:
                continue
            if effort:
                for j in (i - 1, i + 1):
                    if j < count:
                        slope += effort * (controls[i] - (controls[j] if j >= 0 else carried))
                        curvature += effort
            control = steps[i].reach.clip(controls[i] - slope / curvature)
            change = control - controls[i]
            if change:
                errors[i:] = [error + effect * change for effect, error in zip(effects[i], errors[i:], strict=True)]
                controls[i] = control
