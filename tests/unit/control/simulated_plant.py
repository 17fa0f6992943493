"""A simulated policy for tests of the controller: scalars that answer to control as entropy does, with known faults."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import dataclass, field

from megatron_rlvr.control import SteeringResponse


@dataclass
class SimulatedPolicy:
    """ln entropy, moved by updates and measured with noise.

    An update moves it by (drift + clips + gain(f) * f) / updates, where f is the drive of the steering, delayed as by
    Adam's momentum. The next step's entropy moves by ``transfer`` times the shift of the step, plus ``leak``.

    Attributes:
        gain, damping: change of ln entropy per step for a drive of 1 and of -1. ``damping`` None means ``gain``.
        upper, lower: change per step with the upper or the lower threshold fully relaxed.
        turns: steps at which the sign of gain and damping turns.
        momentum: part of the drive that is carried over from one update to the next.
        erratic: spread of the gain (log-normal) and of the drift from step to step.
        collapses: step -> ln by which entropy falls after it.
        told: whether the schedule knows the momentum and the number of updates.
    """

    seed: int = 0
    gain: float = 0.3
    damping: float | None = None
    upper: float = 0.005
    lower: float = -0.005
    drift: float = 0.0
    leak: float = 0.0
    transfer: float = 1.0
    turns: tuple[int, ...] = ()
    momentum: float = 0.0
    erratic: tuple[float, float] = (0.0, 0.0)
    process: float = 0.012
    measurement: float = 0.012
    minibatch: float = 0.015
    updates: int = 16
    collapses: dict[int, float] = field(default_factory=dict)
    told: bool = True

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.log_entropy = math.log(0.4)
        self.sign = 1.0
        self.drive, self.made = 0.0, 0

    def response(self) -> SteeringResponse:
        natural = self.random.gauss(-0.2, 0.04)
        return SteeringResponse(change=0.02 * natural, slope=0.02, ascent=0.1, ascent_slope=-0.02)

    def step(self, schedule, step, reports=True, response=True, error=True):
        """One step under the schedule: returns (measured entropy, target, mean steering)."""
        if step in self.turns:
            self.sign = -self.sign
        deviation = self.measurement
        entropy = math.exp(self.log_entropy + self.random.gauss(0.0, deviation))
        seen = self.response()
        schedule.observe(
            step,
            entropy,
            response=seen if response else None,
            standard_error=deviation * entropy if error else None,
            momentum=(3.0 + self.momentum) / 4.0 if self.told else 0.0,  # effects fade sooner than Adam's average
            updates=self.updates if self.told else 1,
        )
        target, steering, shift = schedule.metrics()["control/target"], 0.0, 0.0
        gain = self.sign * math.exp(self.random.gauss(0.0, self.erratic[0]))
        drift = self.drift + self.random.gauss(0.0, self.erratic[1])
        for index in range(self.updates):
            if reports:
                noise = self.random.gauss(0.0, self.minibatch) if index else 0.0
                schedule.observe_update(step, index, self.updates, shift + noise)
            thresholds = schedule.thresholds(step)
            steering += thresholds.steering / self.updates
            position = schedule.metrics()["control/clip_position"]
            self.made += 1  # Adam divides its average by 1 - beta_1^t
            own = (1.0 - self.momentum) / (1.0 - self.momentum**self.made)
            self.drive += own * (seen.drive(thresholds.steering) - self.drive)
            effect = self.gain if self.drive > 0.0 or self.damping is None else self.damping
            clips = max(position, 0.0) * self.upper + max(-position, 0.0) * self.lower
            shift += (drift + clips + gain * effect * self.drive) / self.updates
        self.log_entropy += self.transfer * shift + self.leak + self.random.gauss(0.0, self.process)
        self.log_entropy += self.collapses.get(step, 0.0)
        return entropy, target, steering


def follow(schedule, policy, steps, **kind):
    """Returns the relative error, entropy / target - 1, of every step."""
    errors = []
    for step in range(steps):
        entropy, target, _ = policy.step(schedule, step, **kind)
        errors.append(entropy / target - 1.0)
    return errors


def rms(errors, skip=0.1):
    kept = errors[math.ceil(skip * len(errors)) :]
    return math.sqrt(sum(e * e for e in kept) / len(kept))


def lag_one(errors):
    """Autocorrelation of successive errors."""
    mean = sum(errors) / len(errors)
    centred = [e - mean for e in errors]
    return sum(a * b for a, b in itertools.pairwise(centred)) / sum(e * e for e in centred)
