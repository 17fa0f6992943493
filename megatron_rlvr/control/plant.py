"""An online model of how entropy responds to control: Kalman filters in the logarithm of the entropy.

    h[k+1] = h[k] + a[k] (d + g_clip * s[k] + g_steer * f[k]) + process noise,     y[k] = h[k] + measurement noise

Here h is ln entropy, a the learning rate relative to its peak, s in [-1, 1] the position of the clip thresholds, f the
drive of the steering (:class:`~megatron_rlvr.control.steering.SteeringResponse`), d the drift that neither explains,
and g the two gains. The state is (h, d, g_clip, g_steer). The model is linear in it for given a, s and f, so one filter
smooths the measurement, estimates the disturbance (the task of an integral term) and learns the gains. The filter
receives the control that was really applied, so a saturated actuator causes no windup. In logarithms, the gains and the
noise are relative, and nearly constant while entropy falls by a factor.

Two models work together. The first (:func:`shift_plant`) runs within a step. Its h is the *shift*: the change of ln
entropy at the step's own states since the step began, which every update measures without sampling noise. The second
(:class:`PlantBank`) runs from step to step and takes that shift as its input: h[k+1] = h[k] + a[k] d + g * shift[k].
They differ because the next step has prompts that were not trained on, and states drawn from another policy.

The noise of the updates themselves differs by an order of magnitude between runs, and it decides how far to trust a
measured error. The bank therefore runs several filters of different process noise and uses the one whose recent
predictions were best.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

SIZE = 4  # components of the state: h, drift, clip gain, steering gain
PROCESS_NOISES = (0.016, 0.008, 0.004, 0.03)  # the first is used until there are measurements
FORGETTING = 0.97  # decay of the summed log-likelihoods per step, so that about the last 30 steps count


@dataclass
class EntropyPlant:
    """One filter: the mean and covariance of the state. Standard deviations are relative (0.02 is 2 % of the entropy).

    ``clip_gain`` and ``steering_gain`` are the prior means: change of ln H per step and unit of the actuator. The
    estimates stay above ``smallest_gain`` times the prior means, because the controller divides by them and their sign
    is known.
    """

    clip_gain: float
    steering_gain: float
    gain_uncertainty: float = 0.7
    smallest_gain: float = 0.1
    drift_deviation: float = 0.02
    drift_walk: float = 0.0015
    process_noise: float = 0.016
    gain_walk: float = 0.06
    score: float = 0.0
    mean: list[float] = field(default_factory=list)
    covariance: list[list[float]] = field(default_factory=list)

    def start(self, log_entropy: float, deviation: float) -> None:
        """Start from the first measurement, with standard deviation ``deviation``."""
        self.mean = [log_entropy, 0.0, self.clip_gain, self.steering_gain]
        spread = [
            deviation,
            self.drift_deviation,
            self.gain_uncertainty * self.clip_gain,
            self.gain_uncertainty * self.steering_gain,
        ]
        self.covariance = [[spread[i] ** 2 if i == j else 0.0 for j in range(SIZE)] for i in range(SIZE)]

    def advance(self, applied: tuple[float, float, float], fraction: float = 1.0) -> None:
        """Predict ``fraction`` of a step ahead under the ``applied`` control (a, a * s, a * f)."""
        row = [1.0, *(fraction * value for value in applied)]
        self.mean[0] = sum(a * x for a, x in zip(row, self.mean, strict=True))
        P = self.covariance
        first = [sum(row[k] * P[k][j] for k in range(SIZE)) for j in range(SIZE)]
        corner = sum(first[j] * row[j] for j in range(SIZE))
        for j in range(1, SIZE):
            P[0][j] = P[j][0] = first[j]
        P[0][0] = corner + fraction * self.process_noise**2
        P[1][1] += fraction * self.drift_walk**2
        P[2][2] += fraction * (self.gain_walk * self.clip_gain) ** 2
        P[3][3] += fraction * (self.gain_walk * self.steering_gain) ** 2

    def correct(self, log_entropy: float, deviation: float) -> float:
        """Update with a measurement of standard deviation ``deviation``; returns measured - predicted."""
        P = self.covariance
        innovation = log_entropy - self.mean[0]
        total = P[0][0] + deviation**2
        self.score = FORGETTING * self.score - 0.5 * (innovation**2 / total + math.log(total))
        gain = [P[i][0] / total for i in range(SIZE)]
        top = list(P[0])
        for i in range(SIZE):
            self.mean[i] += gain[i] * innovation
            for j in range(SIZE):
                P[i][j] -= gain[i] * top[j]
        for i, prior in ((2, self.clip_gain), (3, self.steering_gain)):
            self.mean[i] = max(self.mean[i], self.smallest_gain * prior)
        return innovation

    def restart(self) -> None:
        """Set h to exactly 0 and keep the estimates of the drift and the gains."""
        self.mean[0] = 0.0
        for i in range(SIZE):
            self.covariance[0][i] = self.covariance[i][0] = 0.0

    def state_dict(self) -> dict[str, Any]:
        return {"mean": list(self.mean), "covariance": [list(row) for row in self.covariance], "score": self.score}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        rows = [state["mean"], *state["covariance"]]
        started = [len(row) for row in rows if isinstance(row, list)] == [SIZE] * (SIZE + 1)
        if not (started or rows == [[]]) or not all(isinstance(value, int | float) for row in rows for value in row):
            raise ValueError(f"filter state: a mean and a covariance of size {SIZE} are needed, found {rows}")
        self.mean, self.covariance = list(state["mean"]), [list(row) for row in state["covariance"]]
        self.score = state["score"]


def shift_plant(clip_gain: float, steering_gain: float) -> EntropyPlant:
    """The filter within a step. Every update measures it, so its drift may vary faster than that between steps."""
    plant = EntropyPlant(clip_gain, steering_gain, process_noise=0.012, drift_deviation=0.03, drift_walk=0.01)
    plant.start(0.0, 0.0)
    return plant


class PlantBank:
    """The filters from step to step, of different process noise. ``best`` is the one with the best recent predictions.

    Their input is (a, 0, shift), so their steering gain is g in the equation of the shift above.
    """

    def __init__(self) -> None:
        self.plants = [EntropyPlant(0.0, 1.0, gain_uncertainty=0.5, process_noise=noise) for noise in PROCESS_NOISES]
        self._started = False

    @property
    def started(self) -> bool:
        """Whether there was a first measurement."""
        return self._started

    @property
    def best(self) -> EntropyPlant:
        return max(self.plants, key=lambda plant: plant.score)

    def start(self, log_entropy: float, deviation: float) -> None:
        for plant in self.plants:
            plant.start(log_entropy, deviation)
        self._started = True

    def step(self, rate: float, shift: float, log_entropy: float, deviation: float) -> float:
        """Advance by a step of this rate and shift, then update with the measurement. Returns ``best``'s innovation."""
        best, best_innovation = self.best, 0.0
        for plant in self.plants:
            plant.advance((rate, 0.0, shift))
            innovation = plant.correct(log_entropy, deviation)
            if plant is best:
                best_innovation = innovation
        return best_innovation

    def state_dict(self) -> dict[str, Any]:
        return {"started": self._started, "plants": [plant.state_dict() for plant in self.plants]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._started = state["started"]
        for plant, saved in zip(self.plants, state["plants"], strict=True):
            plant.load_state_dict(saved)
