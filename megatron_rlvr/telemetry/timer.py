"""Wall-clock time of steps: where it goes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


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
