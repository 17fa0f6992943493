"""Warns of a run in which clipping never acts, because old and current policy are the same in every update."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass

STEPS = 3
"""Steps without any ratio other than 1 before the warning."""
ROUNDING = 1e-4
"""Scoring and updates compute log-probs on other paths, so that a ratio of 1 is rounded; in bfloat16 by more."""


@dataclass
class OnPolicyWatch:
    """Warns once if the importance ratio is 1 in all updates of the first steps that it sees.

    A configuration with one update per rollout has a warning of its own when it starts.

    Attributes:
        updates: optimizer steps per rollout.
        is_main: whether this process prints the warning.
        seen: steps in a row in which the ratio was 1.
    """

    updates: int
    is_main: bool = True
    seen: int = 0

    def observe(self, step: int, record: Mapping[str, float]) -> None:
        """Read ``ratio_max``, ``lr`` and ``skipped_updates`` of a finished step."""
        if self.updates == 1 or self.seen >= STEPS:
            return
        inert = abs(record["ratio_max"] - 1) < ROUNDING and not record["skipped_updates"]
        self.seen = self.seen + 1 if inert else 0
        if self.seen == STEPS and self.is_main:
            print(
                f"warning: the importance ratio was 1 in all {self.updates} updates of each of the steps "
                f"{step - STEPS + 1} to {step}, with learning rate {record['lr']:.2g}: updates hardly change the "
                "policy, and no clip threshold acts; raise optimizer.learning_rate, or look at rewards and grad_norm",
                file=sys.stderr,
            )
