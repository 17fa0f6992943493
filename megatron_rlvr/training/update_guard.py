"""Counts updates that were skipped because their loss or gradient was not finite, and stops a run of too many."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_rlvr.checked_input import field
from megatron_rlvr.training.policy import UpdateReport
from megatron_rlvr.training.run_state import run_state_errors


@dataclass
class UpdateGuard:
    """Warns of every skipped update, and gives a reason to stop after several in a row.

    Attributes:
        patience: skipped updates in a row after which the run stops (``optimizer.nonfinite_patience``).
        is_main: whether this process prints the warnings.
        in_a_row: skipped updates in a row so far; part of every checkpoint.
    """

    patience: int
    is_main: bool = True
    in_a_row: int = 0

    def observe(self, step: int, update: UpdateReport) -> str | None:
        """Count an update of `step`; returns the reason to stop, if any. The same on every process."""
        if update.applied:
            self.in_a_row = 0
            return None
        self.in_a_row += 1
        found = f"an update of step {step} was skipped: its loss or gradient is not finite (norm {update.grad_norm})"
        if self.in_a_row >= self.patience:
            return (
                f"{found}; it is number {self.in_a_row} in a row: look at the rewards, ratio_max and grad_norm of the "
                "last steps; lower optimizer.learning_rate, use algorithm.objective.name=dual-clip, or raise "
                "optimizer.nonfinite_patience"
            )
        if self.is_main:
            print(f"warning: {found}", file=sys.stderr)
        return None

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a checkpoint must store."""
        return {"skipped_in_a_row": self.in_a_row}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state of `state_dict`; older checkpoints have none.

        Raises:
            UserError: if it is not a state.
        """
        with run_state_errors():
            self.in_a_row = field(state, "skipped_in_a_row", int, at_least=0, default=0)
