"""The alarm for a mismatch between the policy that generated a rollout and the policy that trains on it."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_rlvr.rollout.config import RolloutConfig


@dataclass
class MismatchAlarm:
    """Warns if KL(rollout || train) of a step exceeds a threshold, and stops the run after several such steps in a row.

    Attributes:
        threshold: threshold of the k3 estimate, in nats per token; 0 disables the alarm.
        patience: consecutive steps above the threshold after which the run stops.
        is_main: whether this process prints the warnings.
        in_a_row: consecutive steps above the threshold so far.
    """

    threshold: float
    patience: int
    is_main: bool = True
    in_a_row: int = 0

    @classmethod
    def build(cls, config: RolloutConfig, draws_from_policy: bool, is_main: bool) -> MismatchAlarm:
        """Build the alarm of a run; it is disabled if the engine does not sample from the current policy."""
        return cls(config.mismatch_alarm if draws_from_policy else 0.0, config.mismatch_patience, is_main)

    def observe(self, step: int, record: Mapping[str, float]) -> str | None:
        """Read ``kl_rollout`` and ``mismatch/max`` from a step's metrics; returns the reason to stop, if any."""
        kl, largest = record["kl_rollout"], record["mismatch/max"]
        if not self.threshold or kl <= self.threshold:  # NaN is above every threshold
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
                "check rollout.sglang.weight_sync and dtypes, set algorithm.objective.importance, or raise "
                "rollout.mismatch_alarm"
            )
        if self.is_main:
            print(f"warning: {measured}", file=sys.stderr)
        return None
