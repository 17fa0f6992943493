"""Wall-clock time of steps: where it goes, and how long the remaining steps will take."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

# Enough steps to smooth the estimate, few enough that it follows responses that grow longer.
RECENT_STEPS = 10


class StepTimer:
    """Adds up the seconds of the named parts of a step. The remaining time of the step is ``time/other``."""

    def __init__(self) -> None:
        self._step_began = time.perf_counter()
        self._parts: dict[str, float] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Add the seconds that the block takes to a part."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, time.perf_counter() - began)

    def add(self, name: str, seconds: float) -> None:
        """Add seconds that were measured elsewhere to a part."""
        self._parts[name] = self._parts.get(name, 0.0) + seconds

    def metrics(self) -> dict[str, float]:
        """``time/<part>`` and ``time/step`` in seconds; starts the next step.

        A step begins when the timer is created, or at the previous call.
        """
        now = time.perf_counter()
        step = now - self._step_began
        metrics = {f"time/{name}": seconds for name, seconds in self._parts.items()}
        metrics["time/other"] = max(0.0, step - sum(self._parts.values()))
        metrics["time/step"] = step
        self._step_began, self._parts = now, {}
        return metrics


class StepPace:
    """Seconds per step, from the ends of the steps of this process."""

    def __init__(self) -> None:
        self._last_end = time.monotonic()
        self._recent: deque[float] = deque(maxlen=RECENT_STEPS)

    def step_ended(self) -> float:
        """Record the end of a step and return its seconds. Evaluation and checkpoint count for the following step."""
        now = time.monotonic()
        seconds, self._last_end = now - self._last_end, now
        self._recent.append(seconds)
        return seconds

    def last(self) -> float | None:
        """Seconds of the last step, None before the first has ended."""
        return self._recent[-1] if self._recent else None

    def mean(self) -> float | None:
        """Mean seconds of the last RECENT_STEPS steps, None before the first has ended."""
        return sum(self._recent) / len(self._recent) if self._recent else None
