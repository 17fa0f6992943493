"""Target entropy: make the measured entropy follow a curve, first by clip thresholds, then by region steering."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

from megatron_rlvr.control.base import Observation
from megatron_rlvr.control.bounds import Within
from megatron_rlvr.control.curves import EntropyCurve
from megatron_rlvr.control.plant import EntropyPlant, PlantBank, shift_plant
from megatron_rlvr.control.schedules import RelativeSchedule
from megatron_rlvr.control.steering import NEUTRAL, SteeringResponse
from megatron_rlvr.control.thresholds import ClipThresholds

SHIFT_NOISE = 0.02
"""Standard deviation of an update's measured shift: its prompts are only part of the step's."""
SHORTEST_AIM = 0.25
"""Smallest fraction of a step over which an error is corrected, so that the last updates need not correct all of it."""
STEERING_PACE = 4.0
"""Within a step, u moves by at most this many times ``steering_rate``."""


@dataclass
class TargetEntropy(RelativeSchedule):
    """Make the entropy follow ``curve`` with two actuators, used in this order.

    1. The thresholds, at a position s in [-1, 1]: s > 0 moves the upper threshold from eps towards H, s < 0 the lower
       one from eps towards M. H and M are set by the four scalars ``upper_*`` and ``lower_*``.
    2. Region steering u, at most ``steering_limit`` in absolute value. At a limit of 0, only the thresholds are used.

    At every step the controller filters the measured entropy and predicts what the entropy would become without
    intervention (:class:`~megatron_rlvr.control.plant.PlantBank`; the predicted first-order change enters as
    feed-forward if ``response`` is observed). It then requests the difference to the next step's target and corrects
    the current error over ``horizon`` steps. If the trainer reports its updates (:meth:`observe_update`), steering is
    recomputed after each of them, so that the step reaches its target although the gains are poorly known and the
    updates are noisy.
    """

    name: ClassVar[str] = "target-entropy"
    curve: EntropyCurve = field(default_factory=EntropyCurve)
    """The target entropy over the progress of the run."""
    floor_only: bool = False
    """Treat the curve as a floor: do not intervene while the predicted entropy stays above it, so that learning is
    unrestricted until entropy is about to collapse."""
    steering_limit: Annotated[float, Within(0.0, 1.0, includes_low=True)] = 0.9
    """Largest absolute value of u, below 1; 0 turns steering off."""
    steering_rate: Annotated[float, Within(0.0)] = 0.35
    """Largest move of u away from 0 at the beginning of a step; within a step it may move four times as far."""
    dead_band: Annotated[float, Within(0.0, 1.0, includes_low=True)] = 0.0
    """Relative deviation from the target below which the controller does nothing."""
    horizon: Annotated[float, Within(1.0, includes_low=True)] = 1.0
    """Number of steps over which an error is corrected, at least 1."""
    measurement_noise: Annotated[float, Within(0.0, 1.0)] = 0.02
    """Relative standard deviation of a step's measured entropy, used if no ``standard_error`` is observed."""
    clip_gain: Annotated[float, Within(0.0, includes_low=True)] = 0.01
    """Initial estimate of the thresholds' effect: change of ln entropy per step at s = 1. 0 keeps them at eps."""
    steering_gain: Annotated[float, Within(0.0)] = 0.2
    """Initial estimate of the effect of steering: change of ln entropy per step at u = 1."""
    # Filters of ln entropy from step to step, and of its shift by the updates within a step.
    _plant: PlantBank = field(init=False, repr=False, compare=False)
    _shift: EntropyPlant = field(init=False, repr=False, compare=False)
    # The last observed step.
    _step: int = field(default=-1, init=False, repr=False)
    _progress: float = field(default=0.0, init=False, repr=False)
    _rate: float = field(default=1.0, init=False, repr=False)  # learning rate relative to its peak
    _response: SteeringResponse = field(default=NEUTRAL, init=False, repr=False)
    # What was decided for it.
    _wanted_shift: float = field(default=0.0, init=False, repr=False)  # of ln entropy, by all updates of the step
    _idle: bool = field(default=True, init=False, repr=False)  # no intervention: in the dead band, or above the floor
    _position: float = field(default=0.0, init=False, repr=False)  # s
    _steering: float = field(default=0.0, init=False, repr=False)  # u
    _applied: tuple[float, float, float] = field(default=(0.0, 0.0, 0.0), init=False, repr=False)  # inputs of _shift
    # Its updates so far.
    _done: float = field(default=0.0, init=False, repr=False)  # fraction of the updates
    _count: int = field(default=1, init=False, repr=False)  # updates per step
    _steering_sum: float = field(default=0.0, init=False, repr=False)  # of u over these updates
    _metrics: dict[str, float] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.clip_gain or self.steering_limit):
            raise ValueError(f"{self.name}: clip_gain 0 and steering_limit 0 leave no actuator; raise one of them")
        self._plant = PlantBank()
        self._shift = shift_plant(self.clip_gain, self.steering_gain)

    def _observe(self, observation: Observation) -> None:
        step, error, rate = observation.step, observation.standard_error, observation.rate
        if step <= self._step:
            raise ValueError(f"{self.name}: step {step} was observed already; observe() is called once per step")
        if error is not None and not 0.0 <= error < math.inf:
            raise ValueError(f"{self.name}: the standard error of step {step} must be finite, found {error!r}")
        if not 0.0 <= rate <= 1.0:
            raise ValueError(f"{self.name}: rate is the learning rate relative to its peak, 0 to 1, found {rate!r}")
        super()._observe(observation)
        assert self.initial_entropy is not None
        # A collapsed policy has entropy 0, and ln 0 would stop the run.
        entropy = max(observation.entropy, 1e-6 * self.initial_entropy)
        deviation = self.measurement_noise if error is None else error / entropy
        if not self._plant.started:
            self._plant.start(math.log(entropy), deviation)
            innovation = 0.0
        else:
            # The part of the previous step that no update reported is assumed to have gone as predicted.
            self._shift.advance(self._applied, 1.0 - self._done)
            innovation = self._plant.step(self._applied[0], self._shift.mean[0], math.log(entropy), deviation)
        previous, self._progress = self._progress, self.progress(step)
        # Steps are evenly spaced. Tokens are assumed to arrive at the rate of the previous step.
        next_progress = (step + 1) / self.total_steps if self.total_tokens is None else 2 * self._progress - previous
        self._step, self._done = step, 0.0
        self._shift.restart()
        self._response, self._rate = observation.response or NEUTRAL, rate
        self._decide(self._target(self._progress), self._target(next_progress))
        self._metrics |= {
            "control/error": entropy / self._target(self._progress) - 1.0,
            "control/innovation": innovation,
        }

    def _target(self, progress: float) -> float:
        assert self.initial_entropy is not None
        return self.curve.value(progress, self.initial_entropy)

    def _decide(self, target: float, next_target: float) -> None:
        """Choose the shift to reach in this step, the thresholds' position, and the initial steering."""
        log_entropy, drift, _, transfer = self._plant.best.mean
        # A step moves entropy in proportion to its learning rate. Without it, warm-up would look like a small gain.
        rate, (inner_drift, clip_gain, steering_gain) = self._rate, self._shift.mean[1:]
        error = math.log(target) - log_entropy
        wanted = math.log(next_target) - (1.0 - 1.0 / self.horizon) * error - log_entropy
        self._wanted_shift = (wanted - rate * drift) / transfer
        free = rate * (inner_drift + steering_gain * self._response.drive(0.0))  # the shift without intervention
        missing = self._wanted_shift - free
        self._idle = abs(transfer * missing) <= self.dead_band or (self.floor_only and missing <= 0.0)
        if self._idle:
            missing = 0.0
        reach = rate * clip_gain
        self._position = min(max(missing / reach, -1.0), 1.0) if reach else 0.0
        previous_steering, self._steering = self._steering, 0.0
        if not self._idle and abs(self._position) in (0.0, 1.0):
            self._steer(previous_steering, self.steering_rate, 1.0)
        self._steering_sum = 0.0
        drive = self._response.drive(self._steering)
        self._applied = (rate, rate * self._position, rate * drive)
        shift = rate * (inner_drift + clip_gain * self._position + steering_gain * drive)
        thresholds_at_limit = abs(self._position) == 1.0 or not self.clip_gain
        steering_at_limit = abs(self._position) in (0.0, 1.0) and abs(self._steering) >= self.steering_limit
        self._metrics = {
            "control/target": target,
            "control/estimate": math.exp(log_entropy),
            "control/next_target": next_target,
            "control/predicted_free": math.exp(log_entropy + rate * drift + transfer * free),
            "control/predicted": math.exp(log_entropy + rate * drift + transfer * shift),
            "control/drift": drift + transfer * inner_drift,
            "control/process_noise": self._plant.best.process_noise,
            "control/clip_gain": transfer * clip_gain,
            "control/steering_gain": transfer * steering_gain,
            "control/transfer": transfer,
            "control/clip_position": self._position,
            "control/wanted_shift": self._wanted_shift,
            # 0: none, 1: the thresholds, 2: both, so that the curve cannot be reached for now
            "control/saturated": 0.0 if not missing else float(thresholds_at_limit) + float(steering_at_limit),
        }

    def _steer(self, previous: float, move: float, remaining: float) -> None:
        """Choose u so that the shift reaches the wanted one in the ``remaining`` fraction of the step.

        u may move away from 0 by at most ``move`` beyond its ``previous`` value: one extreme step can ruin a policy,
        and the gain is known least at the start.
        """
        shift, drift, clip_gain, steering_gain = self._shift.mean
        steering = 0.0
        if self._rate and steering_gain and self.steering_limit:
            pace = (self._wanted_shift - shift) / (self._rate * remaining)
            drive = (pace - drift - clip_gain * self._position) / steering_gain
            steering = self._response.steering_for(drive, self.steering_limit)
        if self.floor_only:
            steering = max(steering, 0.0)
        low, high = min(previous, 0.0) - move, max(previous, 0.0) + move
        self._steering = min(max(steering, low), high)

    def observe_update(self, step: int, index: int, count: int, shift: float | None) -> None:
        self._check_observed(step)
        if not 0 <= index < count:
            raise ValueError(f"{self.name}: the update's index must be from 0 to {count - 1}, found {index}")
        if shift is not None and not math.isfinite(shift):
            raise ValueError(
                f"{self.name}: the shift before update {index} of step {step} must be finite, found {shift!r}"
            )
        if index and shift is not None:  # before the first update the shift is exactly 0
            self._shift.correct(shift, SHIFT_NOISE)
        self._shift.advance(self._applied, 1.0 / count)
        self._done, self._count = (index + 1) / count, count
        self._steering_sum += self._steering
        if self._done < 1.0 and not self._idle:  # the thresholds stay fixed; their error shows in the shift
            remaining = max(1.0 - self._done, SHORTEST_AIM)
            self._steer(self._steering, STEERING_PACE * self.steering_rate / count, remaining)
            rate, clip, _ = self._applied
            self._applied = (rate, clip, rate * self._response.drive(self._steering))
        self._metrics["control/shift"] = self._shift.mean[0]

    def _check_observed(self, step: int) -> None:
        if step != self._step:
            last = "no step" if self._step < 0 else f"step {self._step}"
            raise ValueError(f"{self.name}: call observe() for step {step} first; it was last called for {last}")

    @property
    def wants_updates(self) -> bool:
        return True

    def thresholds(self, step: int) -> ClipThresholds:
        self._check_observed(step)
        lower = upper = self.static
        if self._position > 0.0:
            upper = self.upper.combine(self._position, self.static, 1.0 - self._position)
        elif self._position < 0.0:
            lower = self.lower.combine(-self._position, self.static, 1.0 + self._position)
        return ClipThresholds(lower, upper, self._steering)

    def metrics(self) -> dict[str, float]:
        steering = self._steering_sum / (self._done * self._count) if self._done else self._steering
        return self._metrics | {
            "control/steering": steering,
            # 0: none, 1: the thresholds alone, 2: steering as well
            "control/actuator": 2.0 if steering else 1.0 if self._position else 0.0,
        }

    def state_dict(self) -> dict[str, Any]:
        return {
            **super().state_dict(),
            "plant": self._plant.state_dict(),
            "shift": self._shift.state_dict(),
            "done": self._done,
            "step": self._step,
            "progress": self._progress,
            "position": self._position,
            "steering": self._steering,
            "applied": list(self._applied),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._plant.load_state_dict(state["plant"])
        self._shift.load_state_dict(state["shift"])
        self._done = state["done"]
        self._step, self._progress = state["step"], state["progress"]
        self._position, self._steering = state["position"], state["steering"]
        rate, clip, drive = state["applied"]
        self._applied = (rate, clip, drive)
