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
    a worker is killed while idle                  it is replaced        the pool breaks
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
import select
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from megatron_rlvr.errors import UserError
from megatron_rlvr.verifiers.build import build_verifier
from megatron_rlvr.verifiers.channel import Reply
from megatron_rlvr.verifiers.config import VerifierConfig
from megatron_rlvr.verifiers.source import VerifierSource
from megatron_rlvr.verifiers.verdict import STATUSES, Verdict, judge
from megatron_rlvr.verifiers.worker_process import WorkerFailure, WorkerProcess

logger = logging.getLogger(__name__)

# Items sent to a worker at once: enough to keep it busy while its replies travel, few enough that all workers finish at
# about the same time.
_LARGEST_CHUNK = 64
# How often the pool looks for workers that have died without closing their socket.
_LONGEST_WAIT_S = 1.0
_STARTS = 3


@dataclass(frozen=True)
class Failure:
    """A verification that failed: its verdict, and the traceback if the verifier raised."""

    verdict: Verdict
    traceback: str = ""


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
    replaced and the rest of the batch continues. An item is given to a second worker once if the first died or was
    stopped before it began the item, or sent something that is no reply.

    Args:
        verifier: called as ``verifier(completion, answer)``; returns the reward, or a dictionary whose ``score`` is the
            reward. It must be finite as a float32. A VerifierSource is built by the workers alone; it needs some.
        workers: number of worker processes; 0 for none.
        timeout_s: time limit of one item, in seconds. Time in which the worker waits for a processor does not count.
        memory_mb: limit of a worker's data memory, including the interpreter, in MiB.

    Attributes:
        counts: number of items so far, by status.
        first_failure: the first item without a reward, None if there was none.

    Raises:
        UserError: if a limit is out of range, or the verifier cannot be sent to another process.
    """

    def __init__(
        self,
        verifier: Callable[[str, Any], Any] | VerifierSource,
        workers: int = 0,
        timeout_s: float = 10.0,
        memory_mb: int = 2048,
    ) -> None:
        if workers < 0:
            raise UserError(f"verifier workers must be 0 (in this process) or more, found {workers}")
        if not timeout_s > 0 or not math.isfinite(timeout_s):
            raise UserError(f"the verifier's timeout must be a positive number of seconds, found {timeout_s}")
        if memory_mb < 64:
            raise UserError(f"the verifier's memory limit must be at least 64 MiB, found {memory_mb}")
        self.verifier = verifier
        self.counts: collections.Counter[str] = collections.Counter(dict.fromkeys(STATUSES, 0))
        self.first_failure: Failure | None = None
        self._timeout_s = timeout_s
        self._issued = 0
        self._failed_starts = 0
        self._warned: set[str] = set()
        self._waiting: list[_Request] = []
        self._waiting_lock = threading.Lock()
        self._verifying_lock = threading.Lock()
        self._setup = b""
        if workers:
            source = verifier if isinstance(verifier, VerifierSource) else VerifierSource.of(verifier)
            self._setup = pickle.dumps((memory_mb, timeout_s, source))
        self._workers = [WorkerProcess(self._setup, timeout_s) for _ in range(workers)]
        self._closed = False

    def verify(self, completions: list[str], answers: list[Any]) -> list[Verdict]:
        """Return one verdict per completion, in order.

        Several threads may call this. Calls that arrive while a batch is being verified form the next batch together,
        so that items that hang in several calls cost one timeout, not one per call.

        Raises:
            UserError: if the verifier raises it, which means that an answer of the data set has the wrong form.
                Also if workers cannot load it.
            RuntimeError: if the pool is closed.
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

    @property
    def name(self) -> str:
        """What error messages call the verifier."""
        if isinstance(self.verifier, VerifierSource):
            return f"verifier {self.verifier.name}"
        function = getattr(self.verifier, "func", self.verifier)
        if module := getattr(function, "__module__", ""):
            return f"verifier {module}:{getattr(function, '__qualname__', type(function).__qualname__)}"
        return "the verifier"

    def wait_until_loaded(self) -> None:
        """Wait until one worker has loaded the verifier.

        Raises:
            UserError: if workers cannot load it.
        """
        while self._workers and not any(worker.ready for worker in self._workers):
            readable = self._wait()
            for slot, worker in enumerate(self._workers):
                if worker.socket.fileno() in readable:
                    self._receive(worker)
                if failure := worker.failure():
                    self._replace(slot, failure)

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
            verdicts = self._verify_here(items)
        self.counts.update(verdict.status for verdict in verdicts)
        for verdict in verdicts:
            if verdict.status != "ok" and verdict.status not in self._warned:
                self._warned.add(verdict.status)
                logger.warning(
                    "a completion was not verified (%s): %s; its reward is 0 "
                    "(warned once per status; the metric verifier/failed_fraction counts them)",
                    verdict.status,
                    verdict.detail,
                )
        return verdicts

    def _verify_here(self, items: list[tuple[str, Any]]) -> list[Verdict]:
        assert not isinstance(self.verifier, VerifierSource)
        verdicts = []
        for completion, answer in items:
            verdict, traceback = judge(self.verifier, completion, answer)
            self._note(verdict, traceback)
            verdicts.append(verdict)
        return verdicts

    def _verify_in_workers(self, items: list[tuple[str, Any]]) -> list[Verdict]:
        first = self._issued  # items are numbered over the life of the pool, so a late reply cannot be another's
        self._issued += len(items)
        verdicts: dict[int, Verdict] = {}
        retried: set[int] = set()
        size = max(1, min(_LARGEST_CHUNK, math.ceil(len(items) / (4 * len(self._workers)))))
        chunks = collections.deque(
            list(range(first + i, first + min(i + size, len(items)))) for i in range(0, len(items), size)
        )
        while len(verdicts) < len(items):
            for worker in self._workers:
                if worker.ready and not worker.pending and chunks and worker.failure() is None:
                    chunk = chunks.popleft()
                    worker.send(chunk, [items[index - first] for index in chunk])
            readable = self._wait()
            for slot, worker in enumerate(self._workers):
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
                        self._note(failure.verdict)
                        worker.pending.popleft()
                    retried.add(index)
                # The items after it are often samples of the same prompt and may fail in the same way. They go back to
                # the queue one by one, so that the workers share their timeouts.
                chunks.extendleft([index] for index in reversed(worker.pending))
                self._replace(slot, failure)
        return [verdicts[first + position] for position in range(len(items))]

    def _wait(self) -> set[int]:
        """Wait for replies, for room in a socket, or for a deadline; returns the descriptors that can be read."""
        poll = select.poll()
        for worker in self._workers:
            poll.register(worker.socket, select.POLLIN | (select.POLLOUT if worker.sending else 0))
        wait_s = min(worker.deadline for worker in self._workers) - time.monotonic()
        events = dict(poll.poll(1000 * max(0.0, min(wait_s, _LONGEST_WAIT_S))))
        for worker in self._workers:
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
            UserError: if workers do not load the verifier.
        """
        worker = self._workers[slot]
        worker.kill()
        if failure.while_starting:
            self._failed_starts += 1
            if failure.verdict.status == "timeout" or self._failed_starts >= _STARTS:
                raise UserError(
                    f"{self.name} cannot be loaded: {self._failed_starts} worker processes failed while they loaded it "
                    f"({failure.verdict.detail}, exit status {worker.process.returncode}); import it in a fresh Python "
                    "to see why"
                )
        self._workers[slot] = WorkerProcess(self._setup, self._timeout_s)

    def _note(self, verdict: Verdict, traceback: str = "") -> None:
        if verdict.status != "ok" and self.first_failure is None:
            self.first_failure = Failure(verdict, traceback)


def build_pool(config: VerifierConfig, start_workers: bool = True) -> VerifierPool:
    """Build the verifier of a run and its pool.

    Args:
        config: section ``verifier``, with ``workers`` resolved.
        start_workers: False for ranks that verify nothing.

    Raises:
        UserError: if `build_verifier` or `VerifierPool` refuses the configuration.
    """
    assert config.workers is not None  # `megatron_rlvr.config.resolve` replaces it
    workers = config.workers if start_workers else 0
    limits = (config.timeout_seconds, config.memory_mb)
    if ":" not in config.name or config.workers == 0:
        return VerifierPool(build_verifier(config.name, **config.options), workers, *limits)
    # A module of the user is imported by the workers alone: nothing that it does can reach the trainer.
    pool = VerifierPool(VerifierSource(config.name, config.options), workers, *limits)
    try:
        pool.wait_until_loaded()
    except BaseException:
        pool.close()
        raise
    return pool
