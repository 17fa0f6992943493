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
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from megatron_rlvr.errors import UserError
from megatron_rlvr.verifiers.build import build_verifier
from megatron_rlvr.verifiers.config import VerifierConfig
from megatron_rlvr.verifiers.source import VerifierSource
from megatron_rlvr.verifiers.verdict import STATUSES, Verdict, judge
from megatron_rlvr.verifiers.worker_group import WorkerGroup, WorkersFailedError

logger = logging.getLogger(__name__)


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
        self._warned: set[str] = set()
        self._waiting: list[_Request] = []
        self._waiting_lock = threading.Lock()
        self._verifying_lock = threading.Lock()
        setup = b""
        if workers:
            source = verifier if isinstance(verifier, VerifierSource) else VerifierSource.of(verifier)
            setup = pickle.dumps((memory_mb, timeout_s, source))
        self._group = WorkerGroup(workers, setup, timeout_s, self._note)
        self._workers = self._group.processes
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
        try:
            self._group.wait_until_loaded()
        except WorkersFailedError as error:
            raise self._cannot_be_loaded(error) from error

    def close(self) -> None:
        """Kill the workers. The pool cannot be used afterwards."""
        self._closed = True
        self._group.close()

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
                verdicts = self._group.verify(items)
            except WorkersFailedError as error:
                self.close()
                raise self._cannot_be_loaded(error) from error
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

    def _cannot_be_loaded(self, error: WorkersFailedError) -> UserError:
        return UserError(f"{self.name} cannot be loaded: {error}; import it in a fresh Python to see why")

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
