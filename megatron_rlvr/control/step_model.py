"""What a step can do to entropy: the actuators, what is known of their effects, and the control that follows."""

from __future__ import annotations

import math
from typing import Any

from megatron_rlvr.control.plant import Effect, EntropyPlant
from megatron_rlvr.control.preview import Reach, Shares
from megatron_rlvr.control.steering import NEUTRAL, SteeringResponse

DRIFT, UPPER, LOWER, GAIN = range(1, 5)
"""Effects in the state of the filter: drift, the upper and the lower threshold fully relaxed, a drive of 1."""
CURVATURE = 1.5
"""k in :func:`curved`. From 0.5 to 1.5 it explains the shifts measured on the quickstart's task about equally well."""
LARGEST_DRIVE = 1.5
"""A larger drive counts as this one."""
SHIFT_NOISE = 0.025
"""Least standard deviation of an update's measured shift: its prompts are only part of the step's. A filter that trusts
the measurements more takes what it does not model, such as the varying part of momentum, for a change of the gain."""
NOISE_WEIGHT = 4.0
"""Number of measurements that this value is worth as an estimate."""
NOISE_MEMORY = 40.0
"""Number of measurements that the estimate rests on later."""
LARGEST_SAMPLE = 25.0
"""A measurement changes the estimated variance as if it were at most so many times as large: a collapse is no noise."""
DOUBT = 12.0
"""An estimate that rests on n measurements may be too small by a factor of 1 + DOUBT / n. Nothing but noise explains a
measurement below that."""
SIGN_CERTAINTY = 0.7
"""The sign of an effect is known if its estimate is so many standard deviations from 0."""
SAFE_ERROR = 0.05
"""Change of ln entropy beyond the wanted one that steering may risk until the next measurement."""
UNLUCKY = 2.5
"""A gain is taken to be at most so many standard deviations above its estimate."""
NEGLIGIBLE = 0.02
"""Change of ln entropy per step below which the effect of a threshold is not worth a trial."""
PROBE = 0.1
"""Change of ln entropy, per step, with which a gain of unknown sign is probed."""


def curved(drive: float) -> float:
    """(e^kf - 1) / k of the drive f. Entropy rises more under a drive of f than it falls under -f.

    It can fall only as far as likely tokens can still gain probability.
    """
    return math.expm1(CURVATURE * min(drive, LARGEST_DRIVE)) / CURVATURE


def uncurved(value: float) -> float:
    """The drive whose :func:`curved` value is closest to ``value``."""
    return math.log1p(max(CURVATURE * value, -0.999)) / CURVATURE


class StepModel:
    """The filter of a step's shift, and the control chosen by it: the thresholds' position s and the steering u.

    The shift z is the change of ln entropy at the step's own states since the step began. Over a step,

        z = a (d + g_upper max(s, 0) + g_lower max(-s, 0) + g curved(f(u))),

    where a is the learning rate relative to its peak and f the drive of the step. The effects may have either sign. An
    update follows the optimizer's momentum, so what acts is the average that Adam keeps of these inputs.

    Attributes:
        filter: the filter. Every update measures it, so its drift may vary faster than that between steps.
        rate: a.
        momentum: the part of the average that an update keeps, once the optimizer has made many.
        updates: number of updates per step.
        response: of the step's tokens to steering.
        position, steering: s and u.
    """

    def __init__(self, clip_gain: float, steering_gain: float):
        steering = abs(steering_gain)
        clip_deviation, clip_walk, clip_change = (0.03, 0.002, 0.03) if clip_gain else (0.0, 0.0, 0.0)
        self.filter = EntropyPlant(
            (
                Effect(0.0, deviation=0.03, walk=0.02, change=0.1, decay=0.15),
                Effect(clip_gain, clip_deviation, clip_walk, clip_change),
                Effect(-clip_gain, clip_deviation, clip_walk, clip_change),
                Effect(steering_gain, 0.7 * steering, 0.06 * steering, 3.0 * steering),
            ),
            process_noise=0.012,
        )
        self.filter.start(0.0, 0.0)
        self.rate, self.momentum, self.updates = 1.0, 0.0, 1
        self._made = 0  # updates since the optimizer began
        self._shift_variance, self._shift_weight = SHIFT_NOISE**2, NOISE_WEIGHT
        self._last_innovation: float | None = None  # of this step
        self._average: list[float] = [0.0] * len(self.filter.effects)  # of the inputs, as the optimizer keeps it
        self.response: SteeringResponse = NEUTRAL
        self.position = self.steering = 0.0

    @property
    def shift(self) -> float:
        """z as estimated now."""
        return self.filter.mean[0]

    @property
    def inputs(self) -> tuple[float, ...]:
        """The inputs of the filter under the present control, without momentum and the learning rate."""
        drive = curved(self.response.drive(self.steering))
        return 1.0, max(self.position, 0.0), max(-self.position, 0.0), drive

    def advance(self, updates: int, *, drift: bool = True, noise: bool = True) -> None:
        """Predict so many updates ahead under the present control, with or without drift and process noise."""
        total, inputs = [0.0] * len(self._average), self.inputs
        for _ in range(updates):
            (kept,) = self._kept(1)
            self._made += 1
            self._average = [kept * old + (1.0 - kept) * new for old, new in zip(self._average, inputs, strict=True)]
            total = [a + b for a, b in zip(total, self._average, strict=True)]
        row = [self.rate * x / max(updates, 1) for x in total]
        self.filter.advance((row[0] * drift, *row[1:]), updates / self.updates, noise)

    def measure(self, shift: float) -> None:
        """Update with the shift that an update measured.

        The noise of the measurement depends on the size of a minibatch. Half the squared difference of successive
        innovations estimates its variance, whatever else is unknown.
        """
        innovation = self.filter.correct(shift, self.shift_noise, doubt=self.doubt, span=1.0 / self.updates)
        if self._last_innovation is not None:
            sample = min(0.5 * (innovation - self._last_innovation) ** 2, LARGEST_SAMPLE * self.shift_noise**2)
            self._shift_weight = min(self._shift_weight + 1.0, NOISE_MEMORY)
            self._shift_variance += (sample - self._shift_variance) / self._shift_weight
        self._last_innovation = innovation

    @property
    def shift_noise(self) -> float:
        """The estimated standard deviation of an update's measured shift."""
        return max(SHIFT_NOISE, math.sqrt(self._shift_variance))

    @property
    def doubt(self) -> float:
        """The largest noise that is plausible, as long as its estimate rests on few measurements."""
        return self.shift_noise * (1.0 + DOUBT / self._shift_weight)

    def restart(self) -> None:
        """Begin the shift of a step, which is 0."""
        self.filter.restart()
        self._last_innovation = None

    def _kept(self, updates: int, after: int = 0) -> list[float]:
        """The part of the average that each of the next updates keeps: beta_1, less at the start of the optimizer.

        Adam divides its average by 1 - beta_1^t (arXiv 1412.6980, algorithm 1).
        """
        beta, first = self.momentum, self._made + after
        return [beta * (1.0 - beta**t) / (1.0 - beta ** (t + 1)) for t in range(first, first + updates)]

    @property
    def carried(self) -> float:
        """The effect per step that the average would have if it were kept, without drift."""
        return sum(x * effect for x, effect in zip(self._average[1:], self.filter.mean[2:], strict=True))

    def shares(self, remaining: int, ahead: int) -> list[Shares]:
        """The shares of the ``remaining`` updates of this step and of each step ``ahead`` after it."""
        spans = [(remaining, 0), *((self.updates, remaining + i * self.updates) for i in range(ahead))]
        return [Shares.of_updates(self._kept(*span), self.updates) for span in spans]

    def shift_under(self, effect: float) -> float:
        """The shift of a whole step under a constant control of this effect per step."""
        (shares,) = self.shares(self.updates, 0)
        return self.rate * (self.filter.mean[DRIFT] + shares.carried * self.carried + shares.own * effect)

    @property
    def natural(self) -> float:
        """The effect per step of the step's tokens without intervention."""
        return self.filter.mean[GAIN] * curved(self.response.drive(0.0))

    @property
    def effect(self) -> float:
        """The effect per step of the present control, once momentum has caught up."""
        return sum(x * effect for x, effect in zip(self.inputs[1:], self.filter.mean[2:], strict=True))

    @property
    def gain(self) -> float:
        """The effect of steering per unit of drive, mean over drives from -1 to 1."""
        return self.filter.mean[GAIN] * math.sinh(CURVATURE) / CURVATURE

    def is_certain(self, effect: int) -> bool:
        """Whether the sign of an effect is known. An actuator whose sign is not known is not used.

        Steering by the exact coefficient should raise entropy. That sign needs less evidence, unless a surprise has
        made it doubtful: a gain that is too small to be measured must not stop the controller.
        """
        mean, deviation, prior = (
            self.filter.mean[effect],
            self.filter.deviation(effect),
            self.filter.effects[effect - 1],
        )
        expected = effect == GAIN and mean * prior.mean > 0.0 and deviation <= prior.deviation
        return expected or abs(mean) > SIGN_CERTAINTY * deviation

    def reach(self, limit: float, caution: float = 0.0, hopeful: bool = False) -> Reach:
        """The effects per step of the controls with abs(u) at most ``limit``, with thresholds of known sign.

        ``caution`` takes so many standard deviations off each effect. Steering of unknown sign counts with what it
        could do, so that the wish for it stays, and with it the probe. ``hopeful`` counts thresholds in the same way.
        """
        mean, deviation = self.filter.mean, self.filter.deviation
        sure = {
            i: math.copysign(max(0.0, abs(mean[i]) - caution * deviation(i)), mean[i]) for i in (UPPER, LOWER, GAIN)
        }
        clips = [0.0, *(sure[i] for i in (UPPER, LOWER) if self.is_certain(i))]
        if hopeful:
            open_questions = (abs(mean[i]) + deviation(i) for i in (UPPER, LOWER) if not self.is_certain(i))
            clips += [x for each in open_questions for x in (each, -each)]
        gain = sure[GAIN] if self.is_certain(GAIN) else abs(mean[GAIN]) + deviation(GAIN)
        steers = [gain * curved(self.response.drive(u)) for u in (-limit, 0.0, limit)]
        return Reach(min(clips) + min(steers), max(clips) + max(steers))

    def choose_position(self, missing: float, trial: bool, alone: bool) -> bool:
        """Set the thresholds to have the effect ``missing`` per step; returns whether something is left for steering.

        In a ``trial``, a threshold whose effect has an uncertain sign is relaxed as well, if its effect may be larger
        than NEGLIGIBLE: the difference between steps with and without it is what reveals the effect. Thresholds that
        act ``alone``, without steering, are tried whatever their effect, and against the expected sign if none is
        expected to help.
        """
        able, against = {}, {}
        for sign, effect in ((1.0, UPPER), (-1.0, LOWER)):
            mean, certain = self.filter.mean[effect], self.is_certain(effect)
            tried = trial and (alone or abs(mean) + self.filter.deviation(effect) > NEGLIGIBLE)
            if mean * missing > 0.0:
                if tried or certain:
                    able[sign] = missing / mean
            elif tried and alone and missing and not certain:
                against[sign] = 1.0
        able = able or against
        sign = min(able, key=able.__getitem__, default=0.0)  # that of the stronger threshold
        self.position = sign * min(able.get(sign, 0.0), 1.0)
        return abs(self.position) in (0.0, 1.0)

    def steer(self, effect: float, unseen: float, probe: float, limit: float) -> None:
        """Set u so that the control has this ``effect`` per step.

        The gain is known as well as it was measured, so the rate at which u may move follows from it: until the next
        measurement, after the fraction ``unseen`` of a step, steering may not overshoot by more than SAFE_ERROR even if
        its gain is UNLUCKY. If the sign of the gain is unknown, a small drive of the sign ``probe`` measures it.
        """
        self.steering = 0.0
        if not self.rate:
            return
        mean, deviation = self.filter.mean, self.filter.deviation(GAIN)
        clips = max(self.position, 0.0) * mean[UPPER] + max(-self.position, 0.0) * mean[LOWER]
        missing = effect - clips
        if self.is_certain(GAIN):
            risk = (abs(mean[GAIN]) + UNLUCKY * deviation) * unseen * self.rate
            safe = (SAFE_ERROR + abs(missing)) / risk
            drive = min(max(uncurved(missing / mean[GAIN]), -safe), safe)
        else:
            drive = PROBE / (abs(mean[GAIN]) + deviation)
            # A gain that cannot do more than a probe may is probed in the wanted direction, by its expected sign.
            drive *= probe if drive < 1.0 else math.copysign(1.0, missing * self.filter.effects[GAIN - 1].mean)
        self.steering = self.response.steering_for(drive, limit)

    def state_dict(self) -> dict[str, Any]:
        return {
            "filter": self.filter.state_dict(),
            "rate": self.rate,
            "momentum": self.momentum,
            "updates": self.updates,
            "made": self._made,
            "average": list(self._average),
            "shift_variance": self._shift_variance,
            "shift_weight": self._shift_weight,
            "last_innovation": self._last_innovation,
            "response": [self.response.change, self.response.slope, self.response.ascent, self.response.ascent_slope],
            "position": self.position,
            "steering": self.steering,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.filter.load_state_dict(state["filter"])
        self.rate, self.response = state["rate"], SteeringResponse.from_sums(state["response"])
        self.momentum, self.updates = state["momentum"], state["updates"]
        self._made, self._average = state["made"], list(state["average"])
        self._shift_variance, self._shift_weight = state["shift_variance"], state["shift_weight"]
        self._last_innovation = state["last_innovation"]
        self.position, self.steering = state["position"], state["steering"]
