"""Rollouts of coming steps, generated while the present one trains."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

T = TypeVar("T")


class RolloutsAhead(Generic[T]):
    """Runs `roll_out` for up to `depth` steps after the one that is taken, each in a thread of its own.

    The rollout of step k + depth begins when that of step k is taken, so with the weights that step k begins with: at
    most `depth` versions before those that will train on it.

    Args:
        roll_out: of a step; called in other threads unless `depth` is 0.
        depth: steps ahead.
        end: the step that is not rolled out any more.
    """

    def __init__(self, roll_out: Callable[[int], T], depth: int, end: int):
        self.roll_out, self.depth, self.end = roll_out, depth, end
        self._under_way: dict[int, Future[T]] = {}

    def take(self, step: int) -> T:
        """The rollout of `step`, waited for; raises what it raised."""
        if self.depth == 0:
            return self.roll_out(step)
        self._launch(step)
        result = self._under_way.pop(step).result()
        for later in range(step + 1, min(step + self.depth + 1, self.end)):
            self._launch(later)
        return result

    def _launch(self, step: int) -> None:
        if step in self._under_way:
            return
        future: Future[T] = Future()
        self._under_way[step] = future

        def run() -> None:
            try:
                future.set_result(self.roll_out(step))
            except BaseException as error:  # raised again by `take`
                future.set_exception(error)

        # A daemon: a run that ends early does not wait for rollouts that nobody will use.
        threading.Thread(target=run, name=f"rollout-{step}", daemon=True).start()
