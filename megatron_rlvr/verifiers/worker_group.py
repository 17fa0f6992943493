"""The worker processes of a pool: items are shared among them, and those that fail are replaced."""

import collections
import math
import select
import time
from collections.abc import Callable
from typing import Any

from megatron_rlvr.verifiers.channel import Reply
from megatron_rlvr.verifiers.verdict import Verdict
from megatron_rlvr.verifiers.worker_process import WorkerFailure, WorkerProcess

# Items sent to a worker at once: enough to keep it busy while its replies travel, few enough that all workers finish at
# about the same time.
_LARGEST_CHUNK = 64
# How often the group looks for workers that have died without closing their socket.
_LONGEST_WAIT_S = 1.0
_STARTS = 3


class WorkersFailedError(Exception):
    """Workers do not load the verifier; the text says how the last one failed."""


class WorkerGroup:
    """Worker processes that share the items of a batch. One thread at a time may use it.

    Args:
        count: number of workers.
        setup: what a worker receives first, see `worker.py`.
        timeout_s: time limit of one item, in seconds.
        note: called with the verdict of every item, and the traceback if the verifier raised.

    Attributes:
        processes: the workers; empty after `close`.
    """

    def __init__(self, count: int, setup: bytes, timeout_s: float, note: Callable[[Verdict, str], None]) -> None:
        self.processes = [WorkerProcess(setup, timeout_s) for _ in range(count)]
        self._setup, self._timeout_s, self._note = setup, timeout_s, note
        self._issued = 0
        self._failed_starts = 0

    def wait_until_loaded(self) -> None:
        """Wait until one worker has loaded the verifier.

        Raises:
            WorkersFailedError: if workers cannot load it.
        """
        while self.processes and not any(worker.ready for worker in self.processes):
            readable = self._wait()
            for slot, worker in enumerate(self.processes):
                if worker.socket.fileno() in readable:
                    self._receive(worker)
                if failure := worker.failure():
                    self._replace(slot, failure)

    def verify(self, items: list[tuple[str, Any]]) -> list[Verdict]:
        """Return the verdicts of items, which are pairs of completion and answer, in order.

        After an exception the group must be closed: replies to this batch may still arrive, and the next batch would
        mistake them for its replies.

        Raises:
            WorkersFailedError: if workers cannot load the verifier.
        """
        first = self._issued  # items are numbered over the life of the group, so a late reply cannot be another's
        self._issued += len(items)
        verdicts: dict[int, Verdict] = {}
        retried: set[int] = set()
        size = max(1, min(_LARGEST_CHUNK, math.ceil(len(items) / (4 * len(self.processes)))))
        chunks = collections.deque(
            list(range(first + i, first + min(i + size, len(items)))) for i in range(0, len(items), size)
        )
        while len(verdicts) < len(items):
            for worker in self.processes:
                if worker.ready and not worker.pending and chunks and worker.failure() is None:
                    chunk = chunks.popleft()
                    worker.send(chunk, [items[index - first] for index in chunk])
            readable = self._wait()
            for slot, worker in enumerate(self.processes):
                if worker.socket.fileno() in readable:
                    for reply in self._receive(worker):
                        verdicts[reply.index] = reply.verdict
                failure = worker.failure()
                if failure is None:
                    continue
                if worker.pending:
                    index = worker.pending[0]
                    if failure.item_is_suspect or index in retried:
                        verdicts[index] = failure.verdict
                        self._note(failure.verdict, "")
                        worker.pending.popleft()
                    retried.add(index)
                # The items after it are often samples of the same prompt and may fail in the same way. They go back to
                # the queue one by one, so that the workers share their timeouts.
                chunks.extendleft([index] for index in reversed(worker.pending))
                self._replace(slot, failure)
        return [verdicts[first + position] for position in range(len(items))]

    def close(self) -> None:
        """Kill the workers. The group cannot be used afterwards."""
        for worker in self.processes:
            worker.kill()
        self.processes.clear()

    def _wait(self) -> set[int]:
        """Wait for replies, for room in a socket, or for a deadline; returns the descriptors that can be read."""
        poll = select.poll()
        for worker in self.processes:
            poll.register(worker.socket, select.POLLIN | (select.POLLOUT if worker.sending else 0))
        wait_s = min(worker.deadline for worker in self.processes) - time.monotonic()
        events = dict(poll.poll(1000 * max(0.0, min(wait_s, _LONGEST_WAIT_S))))
        for worker in self.processes:
            if worker.sending and events.get(worker.socket.fileno(), 0) & select.POLLOUT:
                worker.send_more()
        return {descriptor for descriptor, event in events.items() if event & ~select.POLLOUT}

    def _receive(self, worker: WorkerProcess) -> list[Reply]:
        replies = worker.receive()
        if worker.ready:
            self._failed_starts = 0
        for reply in replies:
            self._note(reply.verdict, reply.traceback)
        return replies

    def _replace(self, slot: int, failure: WorkerFailure) -> None:
        """Replace a worker that failed.

        Raises:
            WorkersFailedError: if workers do not load the verifier.
        """
        worker = self.processes[slot]
        worker.kill()
        if failure.while_starting:
            self._failed_starts += 1
            if failure.verdict.status == "timeout" or self._failed_starts >= _STARTS:
                raise WorkersFailedError(
                    f"{self._failed_starts} worker processes failed while they loaded it "
                    f"({failure.verdict.detail}, exit status {worker.process.returncode})"
                )
        self.processes[slot] = WorkerProcess(self._setup, self._timeout_s)
