"""Target entropy: make the measured entropy follow a curve, first by clip thresholds, then by region steering."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

from megatron_rlvr.control.base import Observation
from megatron_rlvr.control.bounds import Within
from megatron_rlvr.control.curves import EntropyCurve
from megatron_rlvr.control.plant import PlantBank
from megatron_rlvr.control.preview import Reach, StepAhead, first_control
from megatron_rlvr.control.schedules import RelativeSchedule
from megatron_rlvr.control.steering import NEUTRAL
from megatron_rlvr.control.step_model import DRIFT, LOWER, UPPER, StepModel
from megatron_rlvr.control.thresholds import ClipThresholds

MODEL = "momentum"
"""Names the filters in checkpoints."""
SHORTEST_AIM = 0.25
"""Smallest fraction of a step over which an error is corrected, so that the last updates need not correct all of it."""
PREVIEW = 10
"""Number of steps ahead for which the curve is read."""
STEERING_PACE = 4.0
"""Within a step, u moves by at most this many times ``steering_rate``."""
ROUNDING = 1e-9
"""A smaller change of ln entropy is none."""
CAUTION = 1.25
"""Steps ahead are planned with so many standard deviations less gain than estimated: leaving a curve early costs less
than being late."""


def logarithmic_mean(x: float, y: float) -> float:
    """(x - y) / (ln x - ln y), which lies between x and y."""
    ratio = math.log(x / y)
    return (x - y) / ratio if abs(ratio) > 1e-6 else y


@dataclass
class TargetEntropy(RelativeSchedule):
    """Make the entropy follow ``curve`` with two actuators, used in this order.

    1. The thresholds, at a position s in [-1, 1]: s > 0 moves the upper threshold from eps towards H, s < 0 the lower
       one from eps towards M. H and M are set by the four scalars ``upper_*`` and ``lower_*``. Either may raise entropy
       or lower it. A threshold is used if the sign of its effect is known, and tried in every other step until then.
    2. Region steering u, at most ``steering_limit`` in absolute value. At a limit of 0, only the thresholds are used:
       a closed loop around the paper's actuators. They are then tried against their expected sign as well, and
       ``control/reach_low`` and ``control/reach_high`` tell whether entropy can be moved in the wanted direction.

    At every step the controller filters the measured entropy and predicts what the entropy would become without
    intervention (:class:`~megatron_rlvr.control.plant.PlantBank`; the predicted first-order change enters as
    feed-forward if ``response`` is observed). It then requests the difference to the next step's target and corrects
    the current error over ``horizon`` steps. It knows the curve ahead: where the curve asks for more than a step can
    do, it begins early and has the error on both sides (:func:`~megatron_rlvr.control.preview.first_control`). If the
    trainer reports its updates (:meth:`observe_update`), steering is recomputed after each of them, so that the step
    reaches its target although the gains are poorly known and the updates are noisy.
    """

    name: ClassVar[str] = "target-entropy"
    curve: EntropyCurve = field(default_factory=EntropyCurve)
    """The target entropy over the progress of the run."""
    floor_only: bool = False
    """Treat the curve as a floor: do not intervene while the predicted entropy stays above it, so that learning is
    unrestricted until entropy is about to collapse."""
    steering_limit: Annotated[float, Within(0.0, 1.0, includes_low=True)] = 0.9
    """Largest absolute value of u, below 1; 0 turns steering off."""
    steering_rate: Annotated[float, Within(0.0)] | None = None
    """Largest move of u away from 0 at the beginning of a step; within a step it may move four times as far. Null: as
    far as is safe, judged by how well the gain of steering is known from the measured shifts."""
    dead_band: Annotated[float, Within(0.0, 1.0, includes_low=True)] = 0.0
    """Relative deviation from the target below which the controller does nothing."""
    horizon: Annotated[float, Within(1.0, includes_low=True)] = 1.0
    """Number of steps over which an error is corrected, at least 1."""
    measurement_noise: Annotated[float, Within(0.0, 1.0)] = 0.02
    """Relative standard deviation of a step's measured entropy, used if no ``standard_error`` is observed."""
    clip_gain: Annotated[float, Within(-1.0, 1.0)] = 0.01
    """Initial estimate of the effect of the upper threshold at s = 1, and of that of the lower one at s = -1 with the
    opposite sign: change of ln entropy per step. 0 keeps both at eps."""
    steering_gain: Annotated[float, Within(0.0)] = 0.2
    """Initial estimate of the effect of steering: change of ln entropy per step and unit of a small drive."""
    drift: Annotated[float, Within(-1.0, 1.0)] = 0.0
    """Initial estimate of the drift between steps: change of ln entropy per step beyond the shift that its updates
    measure at their own states. Below 0 if entropy falls at the states of the next rollout while it stays at these."""
    # Filters of ln entropy from step to step, and of its shift by the updates within a step.
    _plant: PlantBank = field(init=False, repr=False, compare=False)
    _step_model: StepModel = field(init=False, repr=False, compare=False)
    # The last observed step.
    _step: int = field(default=-1, init=False, repr=False)
    _progress: float = field(default=0.0, init=False, repr=False)
    _pace: float = field(default=0.0, init=False, repr=False)  # progress per step
    # What was decided for it.
    _wanted_shift: float = field(default=0.0, init=False, repr=False)  # of ln entropy, by all updates of the step
    _wanted_effect: float = field(default=0.0, init=False, repr=False)  # of the control, per step
    _idle: bool = field(default=True, init=False, repr=False)  # no intervention: in the dead band, or above the floor
    # Its updates so far.
    _done: float = field(default=0.0, init=False, repr=False)  # fraction of the updates
    _unseen: float = field(default=1.0, init=False, repr=False)  # fraction of a step between two measurements
    _steering_sum: float = field(default=0.0, init=False, repr=False)  # of u over these updates
    _metrics: dict[str, float] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.clip_gain or self.steering_limit):
            raise ValueError(f"{self.name}: clip_gain 0 and steering_limit 0 leave no actuator; raise one of them")
        self._plant = PlantBank(self.drift)
        self._step_model = StepModel(self.clip_gain, self.steering_gain)

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
        innovation = self._learn(entropy, error)
        previous, self._progress = self._progress, self.progress(step)
        # Steps are evenly spaced. Tokens are assumed to arrive at the rate of the previous step.
        self._pace = 1.0 / self.total_steps if self.total_tokens is None else self._progress - previous
        self._step, self._done, self._steering_sum = step, 0.0, 0.0
        self._decide(observation)
        self._metrics |= {
            "control/error": entropy / self._target(0) - 1.0,
            "control/innovation": innovation,
        }

    def _learn(self, entropy: float, error: float | None) -> float:
        """Update both filters with the entropy after the previous step; returns the innovation."""
        if not self._plant.started:
            self._plant.start(math.log(entropy), self.measurement_noise if error is None else error / entropy)
            return 0.0
        # The part of the previous step that no update reported is predicted, and the filter knows how well. Its noise
        # and drift are left to the other filter: both would count them.
        model = self._step_model
        model.advance(round((1.0 - self._done) * model.updates), drift=False, noise=False)
        shift_deviation = model.filter.deviation(0)
        self._plant.advance(model.rate, model.shift, self._done)
        predicted, transfer = self._plant.best.mean[0], self._plant.best.mean[2]
        deviation = self.measurement_noise
        if error is not None:
            # Between the predicted and the measured entropy lie as many standard errors in ln as in nats.
            deviation = error / logarithmic_mean(entropy, math.exp(predicted))
        known, doubtful = self._plant.best.deviation(0), self._plant.largest_deviation
        innovation = self._plant.correct(math.log(entropy), deviation, shift_deviation)
        if self._done < 1.0:  # the measurement also tells what the updates did
            shift = model.shift + (math.log(entropy) - predicted) / transfer
            known, doubt = (math.hypot(x, deviation) / transfer for x in (known, doubtful))
            model.filter.correct(shift, known, doubt=doubt)
        self._unseen = 1.0 / model.updates if self._done else 1.0
        model.restart()
        return innovation

    def _target(self, ahead: int) -> float:
        """The target so many steps ahead."""
        assert self.initial_entropy is not None
        return self.curve.value(self._progress + ahead * self._pace, self.initial_entropy)

    def _plan(self) -> None:
        """Choose the control of this step, from the curve ahead and from what the actuators can do."""
        log_entropy, drift, transfer = self._plant.best.mean
        model, limit, alone = self._step_model, self.steering_limit, not self.steering_limit
        drift *= model.rate
        scale = transfer * model.rate  # of an effect per step, in ln entropy
        remaining = round(max(1.0 - self._done, SHORTEST_AIM) * model.updates) or 1
        shares = model.shares(remaining, PREVIEW - 1)
        sure, whole = model.reach(limit, CAUTION, alone), model.reach(limit, hopeful=alone)
        reach = [Reach(scale * each.low, scale * each.high) for each in (whole, *[sure] * (PREVIEW - 1))]
        step_drift = scale * model.filter.mean[DRIFT]
        begun = drift + transfer * model.shift + step_drift * remaining / model.updates
        free = [begun, *[drift + step_drift] * (PREVIEW - 1)]
        error, left = log_entropy - math.log(self._target(0)), 1.0 - 1.0 / self.horizon
        targets = [math.log(self._target(j)) + left**j * error for j in range(1, PREVIEW + 1)]
        steps = [StepAhead(*each) for each in zip(targets, free, reach, shares, strict=True)]
        natural = scale * model.natural if self.floor_only else None
        control, change = first_control(log_entropy, scale * model.carried, steps, natural)
        self._wanted_effect = control / scale if scale else 0.0
        self._wanted_shift = (change - drift) / transfer

    def _decide(self, observation: Observation) -> None:
        """Choose the control of this step: the thresholds' position, and the initial steering."""
        model, previous, rate = self._step_model, self._step_model.steering, observation.rate
        model.response, model.rate, model.position, model.steering = observation.response or NEUTRAL, rate, 0.0, 0.0
        # The effect of a gradient on entropy fades sooner than its weight in Adam's average. Where beta_1 is 0.9, 0.7
        # and 0.8 explain the measured shifts best; with 0.6 a step of the curve is followed best.
        model.momentum, model.updates = max(0.0, 4.0 * observation.momentum - 3.0), observation.updates
        self._plan()
        log_entropy, drift, transfer = self._plant.best.mean
        free = model.shift_under(model.natural)
        missing = self._wanted_shift - free
        self._idle = abs(transfer * missing) <= max(self.dead_band, ROUNDING)
        self._idle |= self.floor_only and missing <= 0.0
        effect = 0.0 if self._idle else self._wanted_effect - model.natural
        thresholds_at_limit = model.choose_position(effect, trial=self._step % 2 == 0, alone=not self.steering_limit)
        if not self._idle and thresholds_at_limit:
            self._steer(previous, 1.0)
        reach = model.reach(self.steering_limit)
        steering_at_limit = thresholds_at_limit and abs(model.steering) >= self.steering_limit
        self._metrics = {
            "control/target": self._target(0),
            "control/estimate": math.exp(log_entropy),
            "control/next_target": self._target(1),
            "control/predicted_free": math.exp(log_entropy + rate * drift + transfer * free),
            "control/predicted": math.exp(log_entropy + rate * drift + transfer * model.shift_under(model.effect)),
            "control/drift": drift + transfer * model.filter.mean[DRIFT],
            "control/process_noise": self._plant.best.process_noise,
            "control/clip_gain": transfer * model.filter.mean[UPPER],
            "control/lower_clip_gain": transfer * model.filter.mean[LOWER],
            "control/steering_gain": transfer * model.gain,
            "control/transfer": transfer,
            "control/shift_noise": model.shift_noise,
            "control/reach_low": rate * (drift + transfer * (model.filter.mean[DRIFT] + reach.low)),
            "control/reach_high": rate * (drift + transfer * (model.filter.mean[DRIFT] + reach.high)),
            "control/clip_position": model.position,
            "control/wanted_shift": self._wanted_shift,
            # 0: none, 1: the thresholds, 2: both, so that the curve cannot be reached for now
            "control/saturated": 0.0 if not effect else float(thresholds_at_limit) + float(steering_at_limit),
        }

    def _steer(self, previous: float, pace: float) -> None:
        """Choose u. Under a ``steering_rate``, it goes at most ``pace`` times as far beyond its previous value."""
        model = self._step_model
        probe = 1.0 if (self._step % 2 == 0) == (self._done < 0.5) else -1.0  # its effects cancel
        model.steer(self._wanted_effect, max(self._unseen, SHORTEST_AIM), probe, self.steering_limit)
        if self.floor_only and model.steering < ROUNDING:
            model.steering = 0.0
        if self.steering_rate is not None:
            move = pace * self.steering_rate
            model.steering = min(max(model.steering, min(previous, 0.0) - move), max(previous, 0.0) + move)

    def observe_update(self, step: int, index: int, count: int, shift: float | None) -> None:
        self._check_observed(step)
        if not 0 <= index < count:
            raise ValueError(f"{self.name}: the update's index must be from 0 to {count - 1}, found {index}")
        if shift is not None and not math.isfinite(shift):
            raise ValueError(
                f"{self.name}: the shift before update {index} of step {step} must be finite, found {shift!r}"
            )
        model = self._step_model
        model.updates = count
        if index and shift is not None:  # before the first update the shift is exactly 0
            model.measure(shift)
        self._done, self._unseen = (index + 1) / count, 1.0 / count
        model.advance(1)
        self._steering_sum += model.steering
        # The thresholds stay fixed; their error shows in the shift. Entropy may also fall to a floor within a step.
        if self._done < 1.0 and (not self._idle or (self.floor_only and not self.dead_band)):
            self._plan()
            self._steer(model.steering, STEERING_PACE / count)
        self._metrics["control/shift"] = model.shift

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
        position = self._step_model.position
        if position > 0.0:
            upper = self.upper.combine(position, self.static, 1.0 - position)
        elif position < 0.0:
            lower = self.lower.combine(-position, self.static, 1.0 + position)
        return ClipThresholds(lower, upper, self._step_model.steering)

    def metrics(self) -> dict[str, float]:
        model = self._step_model
        steering = self._steering_sum / (self._done * model.updates) if self._done else model.steering
        return self._metrics | {
            "control/steering": steering,
            # 0: none, 1: the thresholds alone, 2: steering as well
            "control/actuator": 2.0 if steering else 1.0 if model.position else 0.0,
        }

    def state_dict(self) -> dict[str, Any]:
        return {
            **super().state_dict(),
            "model": MODEL,
            "plant": self._plant.state_dict(),
            "shift": self._step_model.state_dict(),
            "done": self._done,
            "unseen": self._unseen,
            "step": self._step,
            "progress": self._progress,
        }

    def check_version(self, state: dict[str, Any]) -> None:
        if state.get("schedule") == self.name and state.get("model") != MODEL:
            raise ValueError(
                f"schedule state: the checkpoint's {self.name} controller is of an earlier version, whose filters do "
                "not fit; continue it with that version, or start a new run"
            )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._plant.load_state_dict(state["plant"])
        self._step_model.load_state_dict(state["shift"])
        self._done, self._unseen = state["done"], state["unseen"]
        self._step, self._progress = state["step"], state["progress"]
