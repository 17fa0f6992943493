"""Rollouts of later steps, generated while the current step trains."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

T = TypeVar("T")


class RolloutPrefetcher(Generic[T]):
    """Calls `roll_out` for up to `depth` steps ahead of the current one, each in its own thread.

    The rollout of step k + depth starts when the rollout of step k is taken, with the weights at the start of step k.
    Its tokens are therefore at most `depth` versions older than the weights that train on them.

    Args:
        roll_out: generates the rollout of a step; called from other threads unless `depth` is 0.
        depth: number of steps ahead; 0 generates each rollout when it is taken.
        end: the first step that is not rolled out.
    """

    def __init__(self, roll_out: Callable[[int], T], depth: int, end: int):
        self.roll_out, self.depth, self.end = roll_out, depth, end
        self._pending: dict[int, Future[T]] = {}

    def take(self, step: int) -> T:
        """Wait for the rollout of `step` and return it; raises the exception that `roll_out` raised."""
        if self.depth == 0:
            return self.roll_out(step)
        self._launch(step)
        result = self._pending.pop(step).result()
        for later in range(step + 1, min(step + self.depth + 1, self.end)):
            self._launch(later)
        return result

    def _launch(self, step: int) -> None:
        if step in self._pending:
            return
        future: Future[T] = Future()
        self._pending[step] = future

        def run() -> None:
            try:
                future.set_result(self.roll_out(step))
            except BaseException as error:  # raised again by `take`
                future.set_exception(error)

        # A daemon thread, so that a run that ends early does not wait for unused rollouts.
        threading.Thread(target=run, name=f"rollout-{step}", daemon=True).start()
