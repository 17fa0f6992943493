"""An online model of how entropy responds to control: Kalman filters in the logarithm of the entropy.

    h' = h + sum_i c_i e_i + process noise,     y = h + measurement noise

Here h is ln entropy, c the *inputs* that were applied and e their unknown *effects*, of either sign. The state is
(h, e). The model is linear in it for given inputs, so one filter smooths the measurement, estimates the drift (the
effect of an input that is always on, and the task of an integral term) and learns the gains. The filter receives the
inputs that were really applied, so a saturated actuator causes no windup. In logarithms, effects and noise are
relative, and nearly constant while entropy falls by a factor.

Two models work together. The first (:class:`~megatron_rlvr.control.step_model.StepModel`) runs within a step. Its h is
the *shift*: the change of ln entropy at the step's own states since the step began, which every update measures without
sampling noise. The second
(:class:`PlantBank`) runs from step to step and takes that shift as its input: h[k+1] = h[k] + a[k] d + g * shift[k].
They differ because the next step has prompts that were not trained on, and states drawn from another policy.

A random walk is too slow for what happens suddenly: a policy collapses, the sign of a gain turns. A measurement that
the filter finds improbable is therefore compared with two other *explanations*, a jump of h and a change of the
effects. Each widens the covariance along directions of the state. The likeliest one is adopted before the update.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

PROCESS_NOISES = (0.016, 0.008, 0.004, 0.03)  # the first is used until there are measurements
FORGETTING = 0.97  # decay of the summed log-likelihoods per step, so that about the last 30 steps count
CHANGE_ODDS = math.log(0.02)
JUMP_ODDS = math.log(0.002)
"""Log-odds, per step, of a sudden change of the effects and of a jump of h, compared with noise."""
TRANSFER = (0.3, 3.0)
"""Least and greatest estimate of the transfer; the controller divides by it."""
JUMP = 1.0
"""Standard deviation of a jump of ln entropy: a collapse to a third is not surprising among jumps."""


@dataclass(frozen=True)
class Effect:
    """What is known of the effect of one input before the run, per step at full input.

    Attributes:
        mean, deviation: prior mean and standard deviation.
        walk: standard deviation of its random walk, per step.
        change: standard deviation of a sudden change; 0 if it never changes suddenly.
        decay: fraction by which it returns to 0 per step.
    """

    mean: float
    deviation: float
    walk: float
    change: float = 0.0
    decay: float = 0.0


@dataclass
class EntropyPlant:
    """One filter: the mean and covariance of the state (h, effects). Standard deviations of h are relative.

    Attributes:
        effects: prior of the effect of each input.
        process_noise: standard deviation of h per step.
    """

    effects: Sequence[Effect]
    process_noise: float
    score: float = 0.0
    mean: list[float] = field(default_factory=list)
    covariance: list[list[float]] = field(default_factory=list)
    exposure: list[float] = field(default_factory=list)  # inputs summed since h was last set

    def start(self, log_entropy: float, deviation: float) -> None:
        """Start from the first measurement, with standard deviation ``deviation``."""
        self.mean = [log_entropy, *(effect.mean for effect in self.effects)]
        spread = [deviation, *(effect.deviation for effect in self.effects)]
        self.covariance = [[x * x if i == j else 0.0 for j in range(len(spread))] for i, x in enumerate(spread)]
        self.exposure = [0.0] * len(self.effects)

    def advance(self, inputs: Sequence[float], fraction: float = 1.0, noise: bool = True) -> None:
        """Predict ``fraction`` of a step ahead under the applied ``inputs``, with or without process noise."""
        row = [1.0, *(fraction * value for value in inputs)]
        size, P = len(row), self.covariance
        self.mean[0] = _dot(row, self.mean)
        first = [sum(row[k] * P[k][j] for k in range(size)) for j in range(size)]
        for j in range(1, size):
            P[0][j] = P[j][0] = first[j]
        P[0][0] = _dot(first, row) + (fraction * self.process_noise**2 if noise else 0.0)
        for i, effect in enumerate(self.effects, start=1):
            scale = min(1.0, max(abs(self.mean[i] / effect.mean), 0.1)) if effect.mean else 1.0
            P[i][i] += fraction * (scale * effect.walk) ** 2
            kept = (1.0 - effect.decay) ** fraction
            if kept < 1.0:
                self.mean[i] *= kept
                for j in range(size):
                    P[i][j] *= kept
                    P[j][i] *= kept
        self.exposure = [e + x for e, x in zip(self.exposure, row[1:], strict=True)]

    def correct(self, log_entropy: float, deviation: float, *, doubt: float | None = None, span: float = 1.0) -> float:
        """Update with a measurement of standard deviation ``deviation``; returns measured - predicted.

        ``doubt`` is a larger standard deviation, at which the measurement must still be improbable to be explained by
        anything but noise. ``span`` is the fraction of a step since the last measurement.
        """
        P, size = self.covariance, len(self.mean)
        innovation = log_entropy - self.mean[0]
        total = P[0][0] + deviation**2
        self.score = FORGETTING * self.score + _log_likelihood(innovation, total)
        noise = P[0][0] + (deviation if doubt is None else doubt) ** 2
        rarity = math.log(span)
        directions: list[list[float]] = []
        best = _log_likelihood(innovation, noise)
        for odds, widened in self._explanations():
            likelihood = odds + rarity + _log_likelihood(innovation, noise + sum(w[0] ** 2 for w in widened))
            if likelihood > best:
                best, directions = likelihood, widened
        for w in directions:
            for i in range(size):
                for j in range(size):
                    P[i][j] += w[i] * w[j]
            total += w[0] ** 2
        gain, top = [P[i][0] / total for i in range(size)], list(P[0])
        for i in range(size):
            self.mean[i] += gain[i] * innovation
            for j in range(size):
                P[i][j] -= gain[i] * top[j]
        return innovation

    def _explanations(self) -> list[tuple[float, list[list[float]]]]:
        """What else than noise may have happened: log-odds, and directions by which the covariance then is wider.

        A jump of h alone, or a change of any of the effects, acting since h was last set.
        """
        size = len(self.mean)
        changes = []
        for i, effect in enumerate(self.effects):
            if effect.change:
                change = [effect.change * self.exposure[i], *[0.0] * (size - 1)]
                change[i + 1] = effect.change
                changes.append(change)
        jump = [JUMP, *[0.0] * (size - 1)]
        return [(JUMP_ODDS, [jump]), *([(CHANGE_ODDS, changes)] if changes else [])]

    def restart(self) -> None:
        """Set h to exactly 0 and keep the estimates of the effects."""
        self.mean[0] = 0.0
        for i in range(len(self.mean)):
            self.covariance[0][i] = self.covariance[i][0] = 0.0
        self.exposure = [0.0] * len(self.effects)

    def deviation(self, index: int) -> float:
        """The standard deviation of component ``index`` of the state."""
        return math.sqrt(max(0.0, self.covariance[index][index]))

    def state_dict(self) -> dict[str, Any]:
        return {
            "mean": list(self.mean),
            "covariance": [list(row) for row in self.covariance],
            "exposure": list(self.exposure),
            "score": self.score,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        size, rows = 1 + len(self.effects), [state["mean"], *state["covariance"], state["exposure"]]
        lengths = [len(row) for row in rows if isinstance(row, list)]
        if lengths not in ([size] * (size + 1) + [size - 1], [0, 0]) or not all(
            isinstance(value, int | float) for row in rows for value in row
        ):
            raise ValueError(f"filter state: mean, covariance and exposure of size {size} are needed, found {rows}")
        self.mean, self.covariance = list(state["mean"]), [list(row) for row in state["covariance"]]
        self.exposure, self.score = list(state["exposure"]), state["score"]


class PlantBank:
    """The filters from step to step, of different process noise. ``best`` is the one with the best recent predictions.

    The noise of the updates differs by an order of magnitude between runs, and it decides how far to trust a measured
    error. Their inputs are (a, shift), and the effects the drift d and the transfer g.

    Attributes:
        drift: first estimate of d.
    """

    def __init__(self, drift: float = 0.0) -> None:
        self.drift = drift
        effects = (Effect(0.0, 0.02, 0.0015), Effect(1.0, 0.25, 0.03))
        self.plants = [EntropyPlant(effects, noise) for noise in PROCESS_NOISES]
        self._started = False

    @property
    def started(self) -> bool:
        """Whether there was a first measurement."""
        return self._started

    @property
    def best(self) -> EntropyPlant:
        return max(self.plants, key=lambda plant: plant.score)

    @property
    def largest_deviation(self) -> float:
        """The standard deviation of h in the filter that knows it least."""
        return max(plant.deviation(0) for plant in self.plants)

    def start(self, log_entropy: float, deviation: float) -> None:
        for plant in self.plants:
            plant.start(log_entropy, deviation)
            plant.mean[1] = self.drift
        self._started = True

    def advance(self, rate: float, shift: float, reported: float) -> None:
        """Predict a step ahead that made this ``shift``, a fraction of which the updates ``reported``.

        The transfer of a shift that nobody measured cannot be learned.
        """
        for plant in self.plants:
            plant.mean[0] += plant.mean[2] * shift * (1.0 - reported)
            plant.advance((rate, shift * reported))

    def correct(self, log_entropy: float, deviation: float, shift_deviation: float) -> float:
        """Update with a measurement after a shift of standard deviation ``shift_deviation``; returns the innovation."""
        best, best_innovation = self.best, 0.0
        for plant in self.plants:
            plant.covariance[0][0] += (plant.mean[2] * shift_deviation) ** 2
            innovation = plant.correct(log_entropy, deviation)
            plant.mean[2] = min(max(plant.mean[2], TRANSFER[0]), TRANSFER[1])
            if plant is best:
                best_innovation = innovation
        return best_innovation

    def state_dict(self) -> dict[str, Any]:
        return {"started": self._started, "plants": [plant.state_dict() for plant in self.plants]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._started = state["started"]
        for plant, saved in zip(self.plants, state["plants"], strict=True):
            plant.load_state_dict(saved)


def _log_likelihood(innovation: float, variance: float) -> float:
    return -0.5 * (innovation**2 / variance + math.log(variance))


def _dot(left: Sequence[float], right: Sequence[float]) -> float:
    return sum(a * b for a, b in zip(left, right, strict=True))
