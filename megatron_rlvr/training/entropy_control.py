"""Drives the schedule of clip thresholds and the token objective through the steps of a run."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from megatron_rlvr.config_schema import names_key
from megatron_rlvr.control import ClipSchedule
from megatron_rlvr.control.schedules import RelativeSchedule
from megatron_rlvr.data.batch import RolloutBatch
from megatron_rlvr.errors import UserError, as_user_error
from megatron_rlvr.megatron.config import OptimizerConfig
from megatron_rlvr.megatron.parallel import Layout
from megatron_rlvr.objectives import UpdateObjective, build_objective
from megatron_rlvr.objectives.importance import Corrected
from megatron_rlvr.training.config import AlgorithmConfig
from megatron_rlvr.training.head import TokenScores
from megatron_rlvr.training.policy import UpdateReport
from megatron_rlvr.training.rollout_metrics import RolloutMeasure
from megatron_rlvr.training.run_state import check_alike, run_state_errors
from megatron_rlvr.training.step_importance import step_importance
from megatron_rlvr.training.update_metrics import entropy_shift


class EntropyControl:
    """The schedule of clip thresholds and the token objective of a run.

    Every process observes the same measurements, so all processes compute the same thresholds.

    Args:
        algorithm: section ``algorithm`` of the configuration.
        optimizer: section ``optimizer``, for the peak learning rate and beta_1.
        schedule: gives the clip thresholds of every step.
        layout: position of this process in the process groups.

    Attributes:
        objective: the token objective; its entropy bonus, if it has one, adapts to the entropy of each step.
        tokens_seen: response tokens of all steps that have begun.
    """

    def __init__(self, algorithm: AlgorithmConfig, optimizer: OptimizerConfig, schedule: ClipSchedule, layout: Layout):
        self.objective = replace(build_objective(algorithm.objective), reference_kl=algorithm.reference_kl())
        self.tokens_seen = 0
        self._schedule = schedule
        self._initial_entropy: float | None = None  # of step 0, for a schedule that a resumed run changes to
        self._peak_learning_rate, self._momentum = optimizer.learning_rate, optimizer.beta1
        self._old_policy = algorithm.old_policy
        self._minibatches, self._drop = algorithm.minibatches, algorithm.drop_zero_advantage
        self._updates_per_step = algorithm.epochs * algorithm.minibatches
        self._layout = layout
        self._step = 0
        self._current: UpdateObjective
        self._steering: list[float] = []  # steering of each update of the current step so far

    def importance(self, batch: RolloutBatch, advantage: Tensor, scores: TokenScores) -> Corrected | None:
        """Return the importance weights of a step's tokens, see `step_importance`; None without corrections."""
        correct = self.objective.importance
        if correct is None:
            return None
        return step_importance(correct, batch, advantage, scores, self._minibatches, self._layout)

    def trained(self, advantage: Tensor) -> Tensor | None:
        """Return which sequences the updates need, bool [N], from advantages [N]; None for all."""
        return advantage != 0 if self._drop and self.objective.ignores_zero_advantage else None

    def clipped_around(self, batch: RolloutBatch, scores: TokenScores) -> TokenScores:
        """Return the scores of a step with the log-probs of ``algorithm.old_policy``."""
        return scores if self._old_policy == "recomputed" else replace(scores, logprob=batch.rollout_logprob)

    def begin_step(self, step: int, measured: RolloutMeasure, learning_rate: float) -> UpdateObjective:
        """Observe the measurements of a step before its updates.

        Args:
            step: the step, from 0.
            measured: measurements of the step.
            learning_rate: learning rate of the step.

        Returns:
            the objective of the first update.
        """
        self._schedule.observe(
            step,
            measured.entropy,
            tokens=self.tokens_seen,
            response=measured.response,
            standard_error=measured.standard_error,
            rate=learning_rate / self._peak_learning_rate,
            momentum=self._momentum,
            updates=self._updates_per_step,
        )
        self.objective.observe(step, measured.entropy)
        if step == 0:
            self._initial_entropy = measured.entropy
        self.tokens_seen += int(measured.metrics["tokens"])
        self._step, self._steering = step, []
        self._current = UpdateObjective(
            self.objective, self._schedule.thresholds(step), measured.response, measured.importance_weight
        )
        return self._current

    def weighted(self, advantage: Tensor) -> Tensor:
        """Return the advantages [N] times the schedule's weights of their signs in the current step."""
        positive, negative = self._schedule.advantage_weights(self._step)
        if positive == negative == 1.0:
            return advantage
        return torch.where(advantage > 0, positive * advantage, negative * advantage)

    def after_update(self, update: UpdateReport) -> UpdateObjective:
        """Observe how far entropy has moved within the step; returns the objective of the next update.

        Collective over the job: one all-reduce, or none if the schedule does not observe updates.
        """
        self._steering.append(self._current.thresholds.steering)
        if self._schedule.wants_updates:
            shift = entropy_shift(update, self._layout.is_reporting_rank)
            self._schedule.observe_update(self._step, len(self._steering) - 1, self._updates_per_step, shift)
            self._current = replace(self._current, thresholds=self._schedule.thresholds(self._step))
        return self._current

    def metrics(self) -> dict[str, float]:
        """Return metrics of a step after its last update: thresholds, schedule, objective, predicted entropy change."""
        predicted = self._current.response.predicted(statistics.mean(self._steering)) / self._minibatches
        return {
            "entropy_change/predicted": predicted,
            **self._current.thresholds.metrics(),
            **self._schedule.metrics(),
            **self.objective.metrics(),
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the state from which a run continues after the current step."""
        return {
            "schedule": self._schedule.state_dict(),
            "objective": self.objective.state_dict(),
            "tokens_seen": self.tokens_seen,
            "initial_entropy": self._initial_entropy,
        }

    def load_state_dict(self, state: dict[str, Any], allow: Sequence[str] = ()) -> None:
        """Restore the state of `state_dict`.

        Args:
            state: the state.
            allow: ``resume.allow``. If it names the schedule or the objective, a schedule or an entropy bonus that the
                state does not know begins anew, at the present place in the run.

        Raises:
            UserError: if another schedule saved the state, it lacks an entropy bonus that this run has, or it is not a
                state at all.
        """
        with as_user_error(), run_state_errors():
            check_alike({"tokens_seen": 0, "schedule": {"schedule": ""}, "objective": {}}, state, "run.json")
            same_schedule = state["schedule"]["schedule"] == self._schedule.name
            if same_schedule:
                self._schedule.check_version(state["schedule"])
                check_alike(self._schedule.state_dict(), state["schedule"], "schedule")
            check_alike({"initial_entropy": None}, {"initial_entropy": None} | state, "run.json")
            if "entropy_bonus" in state["objective"]:
                check_alike(self.objective.state_dict(), state["objective"], "objective")
        self.tokens_seen = state["tokens_seen"]
        self._initial_entropy = state.get("initial_entropy")  # checkpoints of earlier versions lack it
        with as_user_error():
            if same_schedule:
                self._schedule.load_state_dict(state["schedule"])
            else:
                self._start_schedule(str(state["schedule"]["schedule"]), allow)
            if "entropy_bonus" in state["objective"] or not names_key(allow, "algorithm.objective.name"):
                self.objective.load_state_dict(state["objective"])

    def _start_schedule(self, before: str, allow: Sequence[str]) -> None:
        """Let a schedule that is new to the run begin at its present place.

        Raises:
            UserError: if ``resume.allow`` does not name the schedule, or the entropy of step 0 is not known.
        """
        name = self._schedule.name
        if not names_key(allow, "algorithm.schedule.name"):
            raise UserError(
                f"schedule state: this run is configured for '{name}', the checkpoint holds '{before}'; use the "
                "checkpoint's schedule or start a new run, or add resume.allow=[algorithm.schedule] to change it"
            )
        if isinstance(self._schedule, RelativeSchedule) and self._schedule.initial_entropy is None:
            if self._initial_entropy is None:
                raise UserError(
                    f"schedule {name} needs the entropy of step 0, which the checkpoint does not hold: set "
                    "algorithm.schedule.initial_entropy, in nats per token"
                )
            self._schedule.initial_entropy = self._initial_entropy
