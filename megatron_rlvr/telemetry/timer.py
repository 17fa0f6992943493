"""Where a step's wall-clock time goes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class StepTimer:
    """Adds up the seconds of named parts of a step; what no part claims is ``time/other``."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._parts: dict[str, float] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, time.perf_counter() - began)

    def add(self, name: str, seconds: float) -> None:
        self._parts[name] = self._parts.get(name, 0.0) + seconds

    def metrics(self) -> dict[str, float]:
        """``time/<part>`` and ``time/step`` in seconds since the timer was made or last read; starts the next step."""
        now = time.perf_counter()
        whole = now - self._began
        parts = {f"time/{name}": seconds for name, seconds in self._parts.items()}
        parts["time/other"] = max(0.0, whole - sum(self._parts.values()))
        parts["time/step"] = whole
        self._began, self._parts = now, {}
        return parts
