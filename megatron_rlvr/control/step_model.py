"""What a step can do to entropy: the actuators, what is known of their effects, and the control that follows."""

from __future__ import annotations

import math
from typing import Any

from megatron_rlvr.control.plant import Effect, EntropyPlant
from megatron_rlvr.control.preview import Reach
from megatron_rlvr.control.steering import NEUTRAL, SteeringResponse

DRIFT, UPPER, LOWER, GAIN = range(1, 5)
"""Effects in the state of the filter: drift, the upper and the lower threshold fully relaxed, a drive of 1."""
CURVATURE = 1.5
"""k in :func:`curved`. On the quickstart's task a drive of 0.5 raised entropy by 18 % per step, one of -0.9
lowered it by 12 %."""
LARGEST_DRIVE = 1.5
"""A larger drive counts as this one."""
SIGN_CERTAINTY = 0.7
"""The sign of an effect is known if its estimate is so many standard deviations from 0."""
SAFE_ERROR = 0.05
"""Change of ln entropy beyond the wanted one that steering may risk until the next measurement."""
UNLUCKY = 3.0
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

    where a is the learning rate relative to its peak and f the drive of the step. The effects may have either sign.

    Attributes:
        filter: the filter. Every update measures it, so its drift may vary faster than that between steps.
        rate: a.
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
        self.rate = 1.0
        self.response: SteeringResponse = NEUTRAL
        self.position = self.steering = 0.0

    @property
    def shift(self) -> float:
        """z as estimated now."""
        return self.filter.mean[0]

    @property
    def inputs(self) -> tuple[float, ...]:
        """The inputs of the filter under the present control."""
        drive = curved(self.response.drive(self.steering))
        return tuple(self.rate * x for x in (1.0, max(self.position, 0.0), max(-self.position, 0.0), drive))

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

    def free(self) -> float:
        """The shift of a whole step without intervention."""
        return self.rate * (self.filter.mean[DRIFT] + self.filter.mean[GAIN] * curved(self.response.drive(0.0)))

    def reach(self, limit: float, caution: float = 0.0, hopeful: bool = False) -> Reach:
        """What a whole step can do if abs(u) is at most ``limit``, with thresholds of known sign.

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
        low, high = (mean[DRIFT] + choose(clips) + choose(steers) for choose in (min, max))
        return Reach(self.rate * low, self.rate * high)

    def choose_position(self, missing: float, trial: bool, alone: bool) -> bool:
        """Set the thresholds to add ``missing`` to the shift; returns whether something is left for steering.

        In a ``trial``, a threshold whose effect has an uncertain sign is relaxed as well, if its effect may be larger
        than NEGLIGIBLE: the difference between steps with and without it is what reveals the effect. Thresholds that
        act ``alone``, without steering, are tried whatever their effect, and against the expected sign if none is
        expected to help.
        """
        able, against = {}, {}
        for sign, effect in ((1.0, UPPER), (-1.0, LOWER)):
            mean, certain = self.filter.mean[effect], self.is_certain(effect)
            tried = trial and (alone or abs(mean) + self.filter.deviation(effect) > NEGLIGIBLE)
            if self.rate * mean * missing > 0.0:
                if tried or certain:
                    able[sign] = missing / (self.rate * mean)
            elif tried and alone and missing and not certain:
                against[sign] = 1.0
        able = able or against
        sign = min(able, key=able.__getitem__, default=0.0)  # that of the stronger threshold
        self.position = sign * min(able.get(sign, 0.0), 1.0)
        return abs(self.position) in (0.0, 1.0)

    def steer(self, wanted: float, remaining: float, unseen: float, probe: float, limit: float) -> None:
        """Set u so that the shift reaches ``wanted`` in the ``remaining`` fraction of the step.

        The gain is known as well as it was measured, so the rate at which u may move follows from it: until the next
        measurement, after the fraction ``unseen`` of a step, steering may not overshoot by more than SAFE_ERROR even if
        its gain is UNLUCKY. If the sign of the gain is unknown, a small drive of the sign ``probe`` measures it.
        """
        self.steering = 0.0
        if not self.rate:
            return
        mean, deviation = self.filter.mean, self.filter.deviation(GAIN)
        clips = max(self.position, 0.0) * mean[UPPER] + max(-self.position, 0.0) * mean[LOWER]
        missing = (wanted - self.shift) / self.rate - remaining * (mean[DRIFT] + clips)
        if self.is_certain(GAIN):
            safe = (SAFE_ERROR + abs(missing)) / ((abs(mean[GAIN]) + UNLUCKY * deviation) * unseen * self.rate)
            drive = min(max(uncurved(missing / (remaining * mean[GAIN])), -safe), safe)
        else:
            drive = PROBE / (abs(mean[GAIN]) + deviation)
            # A gain that cannot do more than a probe may is probed in the wanted direction, by its expected sign.
            drive *= probe if drive < 1.0 else math.copysign(1.0, missing * self.filter.effects[GAIN - 1].mean)
        self.steering = self.response.steering_for(drive, limit)

    def state_dict(self) -> dict[str, Any]:
        return {
            "filter": self.filter.state_dict(),
            "rate": self.rate,
            "response": [self.response.change, self.response.slope, self.response.ascent, self.response.ascent_slope],
            "position": self.position,
            "steering": self.steering,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.filter.load_state_dict(state["filter"])
        self.rate, self.response = state["rate"], SteeringResponse.from_sums(state["response"])
        self.position, self.steering = state["position"], state["steering"]
