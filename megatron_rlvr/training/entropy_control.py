"""What the schedule of clip thresholds and the entropy bonus observe in each step, and what they decide."""

from __future__ import annotations

import statistics
from typing import Any

from megatron_rlvr.control import ClipThresholds, SteeringResponse, build_schedule
from megatron_rlvr.errors import as_user_error
from megatron_rlvr.megatron.config import OptimizerConfig
from megatron_rlvr.megatron.parallel import Layout
from megatron_rlvr.objectives import build_objective
from megatron_rlvr.training.config import AlgorithmConfig
from megatron_rlvr.training.policy import UpdateReport
from megatron_rlvr.training.rollout_metrics import RolloutMeasure
from megatron_rlvr.training.update_metrics import entropy_shift


class EntropyControl:
    """The schedule of clip thresholds and the token objective of a run, driven through its steps.

    Every process observes the same measurements, so all of them hold the same thresholds.

    Args:
        algorithm: names schedule and objective, and how many updates a step has.
        optimizer: the peak learning rate.
        steps: of the run.
        layout: of the job.

    Attributes:
        objective: the token objective; its entropy bonus, if it has one, adapts to the entropy of each step.
        tokens_seen: response tokens trained on before the current step.
    """

    def __init__(self, algorithm: AlgorithmConfig, optimizer: OptimizerConfig, steps: int, layout: Layout):
        self.objective = build_objective(algorithm.objective)
        self.tokens_seen = 0
        self._schedule = build_schedule(algorithm.schedule, steps)
        self._peak_learning_rate = optimizer.learning_rate
        self._minibatches = algorithm.minibatches
        self._updates_per_step = algorithm.epochs * algorithm.minibatches
        self._layout = layout
        self._step = 0
        self._response: SteeringResponse
        self._thresholds: ClipThresholds
        self._steering: list[float] = []  # of each update of the step so far

    def begin_step(self, step: int, measured: RolloutMeasure, learning_rate: float) -> ClipThresholds:
        """Observe what a step measured before its updates; returns the thresholds of its first update."""
        self._schedule.observe(
            step,
            measured.entropy,
            tokens=self.tokens_seen,
            response=measured.response,
            standard_error=measured.standard_error,
            rate=learning_rate / self._peak_learning_rate,
        )
        self.objective.observe(step, measured.entropy)
        self.tokens_seen += int(measured.metrics["tokens"])
        self._step, self._response, self._steering = step, measured.response, []
        self._thresholds = self._schedule.thresholds(step)
        return self._thresholds

    def after_update(self, update: UpdateReport) -> ClipThresholds:
        """Observe how far entropy has moved within the step; returns the thresholds of the next update.

        One all-reduce, and none for a schedule that does not observe updates.
        """
        self._steering.append(self._thresholds.steering)
        if self._schedule.wants_updates:
            shift = entropy_shift(update, self._layout.is_reporting_rank)
            self._schedule.observe_update(self._step, len(self._steering) - 1, self._updates_per_step, shift)
            self._thresholds = self._schedule.thresholds(self._step)
        return self._thresholds

    def metrics(self) -> dict[str, float]:
        """Metrics of a step, after its last update: thresholds, schedule, objective and the predicted change."""
        predicted = self._response.predicted(statistics.mean(self._steering)) / self._minibatches
        return {
            "entropy_change/predicted": predicted,
            **self._thresholds.metrics(),
            **self._schedule.metrics(),
            **self.objective.metrics(),
        }

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold to continue after the current step."""
        return {
            "schedule": self._schedule.state_dict(),
            "objective": self.objective.state_dict(),
            "tokens_seen": self.tokens_seen,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`.

        Raises:
            UserError: if the state is of another schedule, or of an objective without an entropy bonus.
        """
        self.tokens_seen = state["tokens_seen"]
        with as_user_error():
            self._schedule.load_state_dict(state["schedule"])
            self.objective.load_state_dict(state["objective"])
