"""The alarm for a mismatch between the policy that generated a rollout and the one that trains on it."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_rlvr.rollout.config import RolloutConfig


@dataclass
class MismatchAlarm:
    """Warns when KL(rollout || train) of a step exceeds a threshold, and asks to stop after several steps in a row.

    Attributes:
        threshold: of the k3 estimate, nats per token; 0 disables the alarm.
        patience: number of steps in a row above the threshold that end the run.
        is_main: whether this process prints the warnings.
        in_a_row: such steps so far.
    """

    threshold: float
    patience: int
    is_main: bool = True
    in_a_row: int = 0

    @classmethod
    def build(cls, config: RolloutConfig, draws_from_policy: bool, is_main: bool) -> MismatchAlarm:
        """The alarm of a run, disabled for an engine whose completions are not drawn from the policy."""
        return cls(config.mismatch_alarm if draws_from_policy else 0.0, config.mismatch_patience, is_main)

    def observe(self, step: int, record: Mapping[str, float]) -> str | None:
        """Read ``kl_rollout`` and ``mismatch/max`` from a step's metrics; returns the reason to stop, if any."""
        kl, largest = record["kl_rollout"], record["mismatch/max"]
        if not self.threshold or kl <= self.threshold:
            self.in_a_row = 0
            return None
        self.in_a_row += 1
        measured = (
            f"KL(rollout || train) of step {step} is {kl:.3g} nats per token, above rollout.mismatch_alarm="
            f"{self.threshold:g}; the largest log-prob difference is {largest:.3g}"
        )
        if self.in_a_row >= self.patience:
            return (
                f"{measured}; this is step {self.in_a_row} in a row: engine and trainer compute different policies; "
                "check weight_sync and dtypes, set algorithm.objective.importance_cap, or raise mismatch_alarm"
            )
        if self.is_main:
            print(f"warning: {measured}", file=sys.stderr)
        return None
