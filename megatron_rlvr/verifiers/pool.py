"""A pool of worker processes for verifiers, so that no completion can hang, crash or starve a run.

Workers are fresh Python interpreters with sockets to the pool. Measured against the ProcessPool of pebble 5.2.3, with
four workers on two cores:

    =============================================  ====================  ================
    .                                              this pool             pebble, spawned
    =============================================  ====================  ================
    first verdict, torch and megatron-core loaded  0.2 s                 12 s
    private memory of a worker                     9 MiB                 285 MiB
    1,024 trivial verifications                    8 to 11 ms            46 to 99 ms
    1,024 verifications by math-verify             70 to 110 ms          190 to 220 ms
    a worker is killed while idle                  its next item fails   the pool breaks
    child processes of an item that timed out      killed                survive
    a hung worker when the trainer is killed       ended by its timer    survives
    =============================================  ====================  ================

A worker that pebble spawns imports the main module of the trainer. A worker that pebble forks starts as fast as in this
pool, but inherits locks that other threads of the trainer hold at that moment.
"""

import collections
import logging
import math
import pickle
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing import connection
from typing import Any

from megatron_rlvr.errors import UserError
from megatron_rlvr.verifiers.build import build_verifier
from megatron_rlvr.verifiers.config import VerifierConfig
from megatron_rlvr.verifiers.verdict import STATUSES, Verdict, judge
from megatron_rlvr.verifiers.worker_process import WorkerProcess

logger = logging.getLogger(__name__)

# Items sent to a worker at once: enough to keep it busy while its replies travel, few enough that all workers finish at
# about the same time.
_LARGEST_CHUNK = 64
_LONGEST_WAIT_S = 3600.0


@dataclass
class _Request:
    """One call of `VerifierPool.verify`: its items, and their verdicts or the error that the call raises."""

    items: list[tuple[str, Any]]
    verdicts: list[Verdict] = field(default_factory=list)
    error: BaseException | None = None
    done: bool = False


class VerifierPool:
    """Runs a verifier over batches of completions.

    With ``workers=0`` the verifier runs in this process without limits. This suits verifiers that are bounded and take
    microseconds (countdown, exact). Otherwise ``workers`` Python processes share the work. A verifier's ``warm_up()``,
    if it has one, is called once in each worker before the first item.

    An item that exceeds a limit, raises, or kills its worker gets reward 0.0 and a status that says so. The worker is
    replaced and the rest of the batch continues.

    Args:
        verifier: called as ``verifier(completion, answer)``; returns the reward.
        workers: number of worker processes; 0 for none.
        timeout_s: time limit of one item, in seconds. Time in which the worker waits for a processor does not count.
        memory_mb: limit of a worker's data memory, including the interpreter, in MiB.

    Attributes:
        counts: number of items so far, by status.

    Raises:
        UserError: if a limit is out of range, or the verifier cannot be sent to another process.
    """

    def __init__(
        self, verifier: Callable[[str, Any], float], workers: int = 0, timeout_s: float = 10.0, memory_mb: int = 2048
    ) -> None:
        if workers < 0:
            raise UserError(f"verifier workers must be 0 (in this process) or more, found {workers}")
        if not timeout_s > 0 or not math.isfinite(timeout_s):
            raise UserError(f"the verifier's timeout must be a positive number of seconds, found {timeout_s}")
        if memory_mb < 64:
            raise UserError(f"the verifier's memory limit must be at least 64 MiB, found {memory_mb}")
        self.verifier = verifier
        self.counts: collections.Counter[str] = collections.Counter(dict.fromkeys(STATUSES, 0))
        self._timeout_s = timeout_s
        self._warned: set[str] = set()
        self._waiting: list[_Request] = []
        self._waiting_lock = threading.Lock()
        self._verifying_lock = threading.Lock()
        self._setup = _pickled_setup(verifier, timeout_s, memory_mb) if workers else b""
        self._workers = [WorkerProcess(self._setup, timeout_s) for _ in range(workers)]
        self._closed = False

    def verify(self, completions: list[str], answers: list[Any]) -> list[Verdict]:
        """Return one verdict per completion, in order.

        Several threads may call this. Calls that arrive while a batch is being verified form the next batch together,
        so that items that hang in several calls cost one timeout, not one per call.

        Raises:
            UserError: if the verifier raises it, which means that an answer of the data set has the wrong form.
            RuntimeError: if workers cannot be started, or the pool is closed.
        """
        if len(completions) != len(answers):
            raise ValueError(f"{len(completions)} completions but {len(answers)} answers")
        request = _Request(list(zip(completions, answers, strict=True)))
        with self._waiting_lock:
            self._waiting.append(request)
        with self._verifying_lock:
            if not request.done:
                with self._waiting_lock:
                    batch, self._waiting = self._waiting, []
                self._serve(batch)
        if request.error is not None:
            raise request.error
        return request.verdicts

    def close(self) -> None:
        """Kill the workers. The pool cannot be used afterwards."""
        self._closed = True
        for worker in self._workers:
            worker.kill()
        self._workers = []

    def __enter__(self) -> "VerifierPool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _serve(self, batch: list[_Request]) -> None:
        """Verify the items of all requests together, and give each request its verdicts or the error."""
        try:
            verdicts = self._verify_items([item for request in batch for item in request.items])
        except BaseException as error:
            for request in batch:
                request.error = error
        else:
            for request in batch:
                request.verdicts, verdicts = verdicts[: len(request.items)], verdicts[len(request.items) :]
        for request in batch:
            request.done = True

    def _verify_items(self, items: list[tuple[str, Any]]) -> list[Verdict]:
        if self._closed:
            raise RuntimeError("this VerifierPool is closed")
        if self._workers:
            try:
                verdicts = self._verify_in_workers(items)
            except BaseException:
                # Replies to this batch may still arrive, and the next batch would mistake them for its replies.
                self.close()
                raise
        else:
            verdicts = [judge(self.verifier, completion, answer) for completion, answer in items]
        self.counts.update(verdict.status for verdict in verdicts)
        for verdict in verdicts:
            if verdict.status != "ok" and verdict.status not in self._warned:
                self._warned.add(verdict.status)
                logger.warning(
                    "a completion was not verified (%s): %s; its reward is 0 "
                    "(warned once per status; VerifierPool.counts has the numbers)",
                    verdict.status,
                    verdict.detail,
                )
        return verdicts

    def _verify_in_workers(self, items: list[tuple[str, Any]]) -> list[Verdict]:
        verdicts: list[Verdict | None] = [None] * len(items)
        unfinished = len(items)
        size = max(1, min(_LARGEST_CHUNK, math.ceil(len(items) / (4 * len(self._workers)))))
        chunks = collections.deque(list(range(i, min(i + size, len(items)))) for i in range(0, len(items), size))
        while unfinished:
            for worker in self._workers:
                if worker.ready and not worker.pending and chunks:
                    chunk = chunks.popleft()
                    worker.send(chunk, [items[index] for index in chunk])
            wait_s = min(worker.deadline for worker in self._workers) - time.monotonic()
            readable = connection.wait(
                [worker.socket for worker in self._workers], max(0.0, min(wait_s, _LONGEST_WAIT_S))
            )
            for slot, worker in enumerate(self._workers):
                if worker.socket in readable:
                    for index, verdict in worker.receive():
                        verdicts[index] = verdict
                        unfinished -= 1
                failure = worker.failure()
                if failure is None:
                    continue
                # Only the item in progress failed.
                if worker.pending:
                    verdicts[worker.pending.popleft()] = failure
                    unfinished -= 1
                # The items after it are often samples of the same prompt and may fail in the same way. They go back to
                # the queue one by one, so that the workers share their timeouts.
                chunks.extendleft([index] for index in reversed(worker.pending))
                worker.kill()
                self._workers[slot] = WorkerProcess(self._setup, self._timeout_s)
        return [verdict for verdict in verdicts if verdict is not None]


def build_pool(config: VerifierConfig, start_workers: bool = True) -> VerifierPool:
    """Build the verifier of a run and its pool.

    Args:
        config: section ``verifier``, with ``workers`` resolved.
        start_workers: False for ranks that verify nothing.

    Raises:
        UserError: if `build_verifier` or `VerifierPool` refuses the configuration.
    """
    verifier = build_verifier(config.name, **config.options)
    assert config.workers is not None  # `megatron_rlvr.config.resolve` replaces it
    return VerifierPool(verifier, config.workers if start_workers else 0, config.timeout_seconds, config.memory_mb)


def _pickled_setup(verifier: Callable[[str, Any], float], timeout_s: float, memory_mb: int) -> bytes:
    """Return the first message to a worker: its limits and the verifier.

    Raises:
        UserError: if the verifier cannot be unpickled in another process.
    """
    function = getattr(verifier, "func", verifier)
    if getattr(function, "__module__", None) == "__main__":
        raise UserError("a verifier defined in the main script cannot be sent to worker processes; move it to a module")
    try:
        return pickle.dumps((memory_mb, timeout_s, pickle.dumps(verifier)))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise UserError(
            f"the verifier cannot be sent to worker processes ({error}); use a module-level function, or workers=0"
        ) from error
