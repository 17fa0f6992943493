"""The alarm on the distance between the policy that rolled out and the one that trains."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass
class MismatchAlarm:
    """Warns of a step whose KL(rollout || train) exceeds a threshold, and asks to stop after several in a row.

    Attributes:
        threshold: of the k3 estimate, nats a token; 0 never warns.
        patience: steps in a row.
        main: whether this process prints the warnings.
    """

    threshold: float
    patience: int
    main: bool = True
    in_a_row: int = 0

    def observe(self, step: int, record: Mapping[str, float]) -> str | None:
        """Take in a step's ``kl_rollout`` and ``mismatch/max``; returns why to stop, if so."""
        kl, largest = record["kl_rollout"], record["mismatch/max"]
        if not self.threshold or kl <= self.threshold:  # a NaN is not beyond it: the entropy would show that
            self.in_a_row = 0
            return None
        self.in_a_row += 1
        found = (
            f"KL(rollout || train) of step {step} is {kl:.3g} nats a token, above rollout.mismatch_alarm="
            f"{self.threshold:g}, the largest log-prob difference {largest:.3g}"
        )
        if self.in_a_row >= self.patience:
            return (
                f"{found}; so it was {self.in_a_row} steps in a row: engine and trainer compute different policies; "
                "look at weight_sync and dtypes, set algorithm.objective.importance_cap, or raise mismatch_alarm"
            )
        if self.main:
            print(f"warning: {found}", file=sys.stderr)
        return None
