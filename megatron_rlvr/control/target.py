"""Target entropy: make the measured entropy follow a curve, first by the thresholds, then by steering regions."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

from megatron_rlvr.control.curves import EntropyCurve
from megatron_rlvr.control.plant import PlantBank
from megatron_rlvr.control.schedules import DynamicSchedule, check_inside, first_entropy
from megatron_rlvr.control.steering import NEUTRAL, SteeringResponse
from megatron_rlvr.control.thresholds import ClipThresholds


@dataclass
class TargetEntropy(DynamicSchedule):
    """Follows ``curve`` with two actuators, in this order.

    1. The thresholds, at position s in [-1, 1]: s > 0 moves the upper one from eps towards its limit H, s < 0 the lower
       one from eps towards its limit M; H and M are the four scalars ``upper_*`` and ``lower_*``.
    2. Region steering u, at most ``steering_limit`` in size: 0 leaves the controller with the thresholds alone.

    Every step it filters the measured entropy, predicts the entropy that the step would leave without intervention
    (:class:`PlantBank`; the predicted first-order change enters as feed-forward where ``response`` is observed), and
    asks for the difference to the next step's target, of which the error so far is made up over ``horizon`` steps.
    Inside ``dead_band`` (relative) it does nothing. With ``floor_only`` the curve is a floor: it never intervenes while
    the predicted entropy stays above, so that learning is free until collapse threatens.

    ``measurement_noise`` is the relative standard deviation of a step's measured entropy, used where ``standard_error``
    is not observed. ``clip_gain`` and ``steering_gain`` are where the online estimates of the actuators' effect start
    (d ln H a step at full position, at u = 1); ``clip_gain`` 0 switches the first actuator off.
    """

    name: ClassVar[str] = "target-entropy"
    curve: EntropyCurve = field(default_factory=EntropyCurve)
    floor_only: bool = False
    initial_entropy: float | None = None
    steering_limit: float = 0.9
    steering_rate: float = 0.35
    dead_band: float = 0.0
    horizon: float = 1.0
    measurement_noise: float = 0.02
    clip_gain: float = 0.01
    steering_gain: float = 0.2
    _plant: PlantBank = field(init=False, repr=False, compare=False)
    _step: int = field(default=-1, init=False, repr=False)
    _progress: float = field(default=0.0, init=False, repr=False)
    _position: float = field(default=0.0, init=False, repr=False)
    _steering: float = field(default=0.0, init=False, repr=False)
    _applied: tuple[float, float, float] = field(default=(0.0, 0.0, 0.0), init=False, repr=False)
    _metrics: dict[str, float] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steering_limit != 0:
            check_inside(self.name, "steering_limit", self.steering_limit, 0.0, 1.0)
        check_inside(self.name, "steering_rate", self.steering_rate, 0.0, math.inf)
        if self.initial_entropy is not None:
            check_inside(self.name, "initial_entropy", self.initial_entropy, 0.0, math.inf)
        if self.dead_band != 0:
            check_inside(self.name, "dead_band", self.dead_band, 0.0, 1.0)
        if self.clip_gain != 0:
            check_inside(self.name, "clip_gain", self.clip_gain, 0.0, math.inf)
        check_inside(self.name, "steering_gain", self.steering_gain, 0.0, math.inf)
        check_inside(self.name, "measurement_noise", self.measurement_noise, 0.0, 1.0)
        if not self.horizon >= 1.0:
            raise ValueError(f"{self.name}: horizon must be at least 1 step, found {self.horizon!r}")
        if not (self.clip_gain or self.steering_limit):
            raise ValueError(f"{self.name}: clip_gain 0 and steering_limit 0 leave no actuator; raise one of them")
        self._plant = PlantBank(self.clip_gain, self.steering_gain)

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
        if step <= self._step:
            raise ValueError(f"{self.name}: step {step} was observed already; observe() is called once a step")
        if standard_error is not None and not 0.0 <= standard_error < math.inf:
            raise ValueError(f"{self.name}: the standard error of step {step} must be finite, found {standard_error!r}")
        if not 0.0 <= rate <= 1.0:
            raise ValueError(f"{self.name}: rate is the learning rate relative to its peak, 0 to 1, found {rate!r}")
        if self.initial_entropy is None:
            self.initial_entropy = first_entropy(self.name, step, entropy)
        entropy = max(entropy, 1e-6 * self.initial_entropy)  # a dead policy has entropy 0, and ln 0 would stop the run
        deviation = self.measurement_noise if standard_error is None else standard_error / entropy
        if not self._plant.started:
            self._plant.start(math.log(entropy), deviation)
            innovation = 0.0
        else:
            innovation = self._plant.step(self._applied, math.log(entropy), deviation)
        previous, self._progress = self._progress, self.progress(step)
        # Steps are evenly spaced; tokens are taken to come at the rate of the step before.
        ahead = (step + 1) / self.total_steps if self.total_tokens is None else 2 * self._progress - previous
        self._step = step
        self._decide(self._target(self._progress), self._target(ahead), response or NEUTRAL, rate)
        self._metrics |= {
            "control/error": entropy / self._target(self._progress) - 1.0,
            "control/innovation": innovation,
        }

    def _target(self, progress: float) -> float:
        assert self.initial_entropy is not None
        return self.curve.value(progress, self.initial_entropy)

    def _decide(self, target: float, next_target: float, response: SteeringResponse, rate: float) -> None:
        """Choose the thresholds' position and the steering for this step."""
        log_entropy = self._plant.best.mean[0]
        # A step moves entropy in proportion to its learning rate; without it, warm-up would be taken for a small gain.
        drift, clip_gain, steering_gain = (rate * value for value in self._plant.best.mean[1:])
        unsteered = response.drive(0.0)
        free = log_entropy + drift + steering_gain * unsteered  # ln H after the step, without intervention
        error = math.log(target) - log_entropy
        wanted = math.log(next_target) - (1.0 - 1.0 / self.horizon) * error - free
        if self.floor_only:
            wanted = max(math.log(next_target) - free, 0.0)
        if abs(wanted) <= self.dead_band:
            wanted = 0.0
        self._position = min(max(wanted / clip_gain, -1.0), 1.0) if clip_gain else 0.0
        rest = wanted - clip_gain * self._position if abs(self._position) in (0.0, 1.0) else 0.0
        steering = 0.0
        if rest and steering_gain:
            steering = response.steering_for(unsteered + rest / steering_gain, self.steering_limit)
        # One wild step can wreck a policy, and the gain is least known at the start: u leaves 0 by small steps.
        low, high = min(self._steering, 0.0) - self.steering_rate, max(self._steering, 0.0) + self.steering_rate
        self._steering = min(max(steering, low), high)
        drive = response.drive(self._steering)
        self._applied = (rate, rate * self._position, rate * drive)
        steering_saturated = abs(self._steering) >= self.steering_limit and rest != 0.0
        self._metrics = {
            "control/target": target,
            "control/estimate": math.exp(log_entropy),
            "control/next_target": next_target,
            "control/predicted_free": math.exp(free),
            "control/predicted": math.exp(log_entropy + drift + clip_gain * self._position + steering_gain * drive),
            "control/drift": self._plant.best.mean[1],
            "control/process_noise": self._plant.best.process_noise,
            "control/clip_gain": self._plant.best.mean[2],
            "control/steering_gain": self._plant.best.mean[3],
            "control/clip_position": self._position,
            "control/steering": self._steering,
            # 0: none works, 1: the thresholds alone, 2: steering on top of them
            "control/actuator": 2.0 if self._steering else 1.0 if self._position else 0.0,
            # 0: none, 1: the thresholds, 2: both (then the curve is out of reach for now)
            "control/saturated": float((abs(self._position) >= 1.0 or not self.clip_gain) and bool(wanted))
            + float(steering_saturated),
        }

    def thresholds(self, step: int) -> ClipThresholds:
        if step != self._step:
            raise ValueError(f"{self.name}: thresholds of step {step} asked for, but the last observed is {self._step}")
        lower = upper = self.static
        if self._position > 0.0:
            upper = self.upper.combine(self._position, self.static, 1.0 - self._position)
        elif self._position < 0.0:
            lower = self.lower.combine(-self._position, self.static, 1.0 + self._position)
        return ClipThresholds(lower, upper, self._steering)

    def metrics(self) -> dict[str, float]:
        return dict(self._metrics)

    def state_dict(self) -> dict[str, Any]:
        own = {
            "initial_entropy": self.initial_entropy,
            "plant": self._plant.state_dict(),
            "step": self._step,
            "progress": self._progress,
            "position": self._position,
            "steering": self._steering,
            "applied": list(self._applied),
        }
        return {**super().state_dict(), **own}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.initial_entropy = state["initial_entropy"]
        self._plant.load_state_dict(state["plant"])
        self._step, self._progress = state["step"], state["progress"]
        self._position, self._steering = state["position"], state["steering"]
        rate, clip, drive = state["applied"]
        self._applied = (rate, clip, drive)
