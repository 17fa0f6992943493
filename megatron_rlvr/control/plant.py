"""An online model of how entropy answers to control: Kalman filters in the logarithm of the entropy.

    h[k+1] = h[k] + a[k] (d + g_clip * s[k] + g_steer * f[k]) + process noise,     y[k] = h[k] + measurement noise

h is ln entropy, a the learning rate relative to its peak, s in [-1, 1] the position of the clip thresholds, f the
steering's drive (see :class:`~megatron_rlvr.control.steering.SteeringResponse`), d the drift that neither explains and
g the two gains: the state is (h, d, g_clip, g_steer). It is linear in the state given a, s and f, so one filter smooths
the measurement, estimates the disturbance - which is what an integral term would do - and learns the gains. It is told
what was really applied, so a saturated actuator winds nothing up. Logarithms make the gains and the noise relative, and
nearly constant while entropy falls by a factor.

Two of them work together. One is of this form within a step (:func:`shift_plant`): its h is the *shift*, the change of
ln entropy at the step's own states since the step began, which every update measures anew without sampling noise.
:class:`PlantBank` goes from step to step, and its input is that shift: h[k+1] = h[k] + a[k] d + g * shift[k]. The two
differ because the next step's prompts were not trained on and its states are drawn by another policy.

How noisy the updates themselves are differs by an order of magnitude between runs, and decides how much of a measured
error to believe. So several filters that differ in their process noise run side by side, and the one that has predicted
the measurements best lately is used.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

SIZE = 4  # h, drift, clip gain, steering gain
PROCESS_NOISES = (0.016, 0.008, 0.004, 0.03)  # the first is used until measurements tell
FORGETTING = 0.97  # of the likelihoods: about the last 30 steps count


@dataclass
class EntropyPlant:
    """One filter: mean and covariance; standard deviations are relative (0.02 is 2 percent of the entropy).

    ``clip_gain`` and ``steering_gain`` are prior means of d ln H a step per unit of actuator; the estimates never fall
    below ``smallest_gain`` of them, because the sign of either gain is known and a controller divides by it.
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
        """Begin at the first measurement, of standard deviation ``deviation``."""
        self.mean = [log_entropy, 0.0, self.clip_gain, self.steering_gain]
        spread = [
            deviation,
            self.drift_deviation,
            self.gain_uncertainty * self.clip_gain,
            self.gain_uncertainty * self.steering_gain,
        ]
        self.covariance = [[spread[i] ** 2 if i == j else 0.0 for j in range(SIZE)] for i in range(SIZE)]

    def advance(self, applied: tuple[float, float, float], share: float = 1.0) -> None:
        """Predict ``share`` of a step ahead under what was ``applied``: (a, a * s, a * f)."""
        row = [1.0, *(share * value for value in applied)]
        self.mean[0] = sum(a * x for a, x in zip(row, self.mean, strict=True))
        P = self.covariance
        first = [sum(row[k] * P[k][j] for k in range(SIZE)) for j in range(SIZE)]
        corner = sum(first[j] * row[j] for j in range(SIZE))
        for j in range(1, SIZE):
            P[0][j] = P[j][0] = first[j]
        P[0][0] = corner + share * self.process_noise**2
        P[1][1] += share * self.drift_walk**2
        P[2][2] += share * (self.gain_walk * self.clip_gain) ** 2
        P[3][3] += share * (self.gain_walk * self.steering_gain) ** 2

    def correct(self, log_entropy: float, deviation: float) -> float:
        """Take in a measurement of standard deviation ``deviation``; returns the innovation, measured - predicted."""
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
        """Set h to exactly 0 and keep what is known of the drift and the gains."""
        self.mean[0] = 0.0
        for i in range(SIZE):
            self.covariance[0][i] = self.covariance[i][0] = 0.0

    def state_dict(self) -> dict[str, Any]:
        return {"mean": list(self.mean), "covariance": [list(row) for row in self.covariance], "score": self.score}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.mean, self.covariance = list(state["mean"]), [list(row) for row in state["covariance"]]
        self.score = state["score"]


def shift_plant(clip_gain: float, steering_gain: float) -> EntropyPlant:
    """The filter within a step. It is measured at every update, so its drift may wander further than that of steps."""
    plant = EntropyPlant(clip_gain, steering_gain, process_noise=0.012, drift_deviation=0.03, drift_walk=0.01)
    plant.start(0.0, 0.0)
    return plant


class PlantBank:
    """The filters from step to step, of different process noise; ``best`` has predicted best lately.

    Their steering gain is the transfer g of the module's docstring, their input (a, 0, shift).
    """

    def __init__(self) -> None:
        self.plants = [EntropyPlant(0.0, 1.0, gain_uncertainty=0.5, process_noise=noise) for noise in PROCESS_NOISES]
        self._started = False

    @property
    def started(self) -> bool:
        return self._started

    @property
    def best(self) -> EntropyPlant:
        return max(self.plants, key=lambda plant: plant.score)

    def start(self, log_entropy: float, deviation: float) -> None:
        for plant in self.plants:
            plant.start(log_entropy, deviation)
        self._started = True

    def step(self, rate: float, shift: float, log_entropy: float, deviation: float) -> float:
        """Advance by a step of this rate and shift, then take in the measurement; returns the best's innovation."""
        best, result = self.best, 0.0
        for plant in self.plants:
            plant.advance((rate, 0.0, shift))
            innovation = plant.correct(log_entropy, deviation)
            result = innovation if plant is best else result
        return result

    def state_dict(self) -> dict[str, Any]:
        return {"started": self._started, "plants": [plant.state_dict() for plant in self.plants]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._started = state["started"]
        for plant, saved in zip(self.plants, state["plants"], strict=True):
            plant.load_state_dict(saved)
