"""How long the rest of a run will take."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

RECENT_STEPS = 10
# Steps are weighted by how recent they are: enough of them count to smooth the estimate, few enough that it follows
# responses that grow longer, and forgets slow steps at the beginning.
_DECAY = 0.85

# One step that waited for something, such as a server that restarted, says little about those to come.
_OUTLIER = 2.0


@dataclass(frozen=True)
class PeriodicWork:
    """When a run evaluates and saves, besides its steps.

    Attributes:
        evaluates: whether there are held-out prompts. Then the run evaluates before step 0 and after its last step.
        evaluation_every, checkpoint_every: steps between two of them; 0 for none in between.
    """

    evaluates: bool = False
    evaluation_every: int = 0
    checkpoint_every: int = 0

    def evaluations_left(self, finished: int, total: int) -> int:
        """Return how many evaluations follow the end of step number `finished` of `total` steps."""
        if not self.evaluates or finished >= total:
            return 0
        every = self.evaluation_every or total
        return (total - 1) // every - (finished - 1) // every + 1

    def checkpoints_left(self, finished: int, total: int) -> int:
        """Return how many checkpoints follow; that of the finished steps is written after their metrics."""
        every = self.checkpoint_every or total
        return total // every - (max(finished, 1) - 1) // every + (total % every > 0)


class TimeLeft:
    """Estimates the time of the remaining steps, evaluations and checkpoints of a run.

    Steps are expected to take as long as the recent ones did without evaluations and checkpoints, whose own times are
    counted once for each that is still to come. The first step of a process, which loads and compiles, counts only
    until there is another.

    Args:
        steps: steps of the run.
        work: when it evaluates and saves.
        history: records of earlier processes of the run, which say how long evaluations and checkpoints take.
    """

    def __init__(self, steps: int, work: PeriodicWork | None = None, history: Sequence[Mapping[str, Any]] = ()) -> None:
        self._steps, self._work = steps, work or PeriodicWork()
        self._plain: deque[float] = deque(maxlen=RECENT_STEPS)
        self._whole: deque[float] = deque(maxlen=RECENT_STEPS)
        self._first: float | None = None
        self._evaluations: deque[float] = deque(maxlen=RECENT_STEPS)
        self._checkpoints: deque[float] = deque(maxlen=RECENT_STEPS)
        self._finished = 0
        for record in history:
            self._note(record)
        self._last_end = time.monotonic()

    def step_ended(self, record: Mapping[str, Any]) -> float:
        """Take notice of the record of a finished step; returns the seconds since the end of the step before."""
        now = time.monotonic()
        seconds, self._last_end = now - self._last_end, now
        plain = max(0.0, seconds - self._note(record))
        self._whole.append(seconds)
        if self._first is None:
            self._first = plain
        else:
            self._plain.append(plain)
        return seconds

    def _note(self, record: Mapping[str, Any]) -> float:
        """Note the evaluation and the checkpoint of a step; returns their seconds."""
        self._finished = int(record["step"]) + 1
        total = 0.0
        for name, seen in (("time/evaluate", self._evaluations), ("time/checkpoint", self._checkpoints)):
            if seconds := float(record.get(name) or 0.0):
                seen.append(seconds)
                total += seconds
        return total

    def last_step(self) -> float | None:
        """Seconds of the last step, with its evaluation and checkpoint; None before the first has ended."""
        return self._whole[-1] if self._whole else None

    def mean_step(self) -> float | None:
        """Mean seconds of the recent steps, with evaluations and checkpoints; None before the first has ended."""
        return _mean(self._whole)

    def at_last_end(self) -> float | None:
        """Seconds that the run still needed at the end of its last step; None before the first has ended."""
        plain = self._typical_step()
        if plain is None:
            return None
        evaluations = self._work.evaluations_left(self._finished, self._steps)
        checkpoints = self._work.checkpoints_left(self._finished, self._steps)
        return (
            plain * (self._steps - self._finished)
            + (_mean(self._evaluations) or 0.0) * evaluations
            + (_mean(self._checkpoints) or 0.0) * checkpoints
        )

    def now(self) -> float | None:
        """Seconds that the run still needs; None before the first step has ended."""
        left = self.at_last_end()
        return None if left is None else max(0.0, left - (time.monotonic() - self._last_end))

    def _typical_step(self) -> float | None:
        if not self._plain:
            return self._first
        limit = _OUTLIER * sorted(self._plain)[len(self._plain) // 2]
        weights = [_DECAY**age for age in range(len(self._plain))]
        weighted = sum(w * min(seconds, limit) for w, seconds in zip(weights, reversed(self._plain), strict=True))
        return weighted / sum(weights)


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
