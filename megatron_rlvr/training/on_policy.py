"""Warns of a run that hardly trains: old and current policy are the same, or corrections leave out most tokens."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass

STEPS = 3
"""Steps without any ratio other than 1 before the warning."""
ROUNDING = 1e-4
"""Scoring and updates compute log-probs on other paths, so that a ratio of 1 is rounded; in bfloat16 by more."""
LEFT_OUT = 0.9
"""Fraction of the tokens above which corrections leave out nearly all."""


@dataclass
class OnPolicyWatch:
    """Warns once if the importance ratio is 1 in all updates of some steps in a row, so that clipping never acts.

    It warns once, too, if ``algorithm.objective.importance`` leaves out nearly all tokens of as many steps. A
    configuration with one update per rollout has a warning of its own when it starts.

    Attributes:
        updates: optimizer steps per rollout.
        is_main: whether this process prints the warning.
        seen: steps in a row in which the ratio was 1.
        left_out: steps in a row in which corrections left out nearly all tokens.
    """

    updates: int
    is_main: bool = True
    seen: int = 0
    left_out: int = 0

    def observe(self, step: int, record: Mapping[str, float]) -> None:
        """Read ``ratio_max``, ``lr``, ``skipped_updates`` and ``mismatch/masked_fraction`` of a finished step."""
        self._observe_corrections(step, record.get("mismatch/masked_fraction", 0.0))
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

    def _observe_corrections(self, step: int, masked: float) -> None:
        if self.left_out >= STEPS:
            return
        self.left_out = self.left_out + 1 if masked > LEFT_OUT else 0
        if self.left_out == STEPS and self.is_main:
            print(
                f"warning: algorithm.objective.importance left out nearly all tokens of each of the steps "
                f"{step - STEPS + 1} to {step} ({masked:.1%} of step {step}), so that little is trained: widen its "
                "bounds, or find out why rollout and training policy differ (docs/mismatch.md)",
                file=sys.stderr,
            )
