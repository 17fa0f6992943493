"""Verifiers in worker processes, so that no answer can hang, crash or starve a run."""

import collections
import contextlib
import logging
import math
import os
import pickle
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from megatron_rlvr.errors import UserError
from megatron_rlvr.verifiers.channel import FrameReader, send_frame

logger = logging.getLogger(__name__)

# ok; error: the verifier raised; timeout; memory: it asked for more than the limit; crash: its process died.
STATUSES = ("ok", "error", "timeout", "memory", "crash")
# An unhurried machine imports a verifier in a second or two; a node that starts 64 workers at once takes longer.
_START_TIMEOUT_S = 120.0
# Enough to keep a worker busy while its replies travel, few enough that the last worker to finish is not far behind.
_CHUNK = 64


class Verdict(NamedTuple):
    """The reward of one completion, how it came about (one of STATUSES), and what went wrong, if anything did."""

    reward: float
    status: str
    detail: str = ""


@dataclass
class _Batch:
    """What one call of `VerifierPool.verify` asks, and what came of it."""

    items: list[tuple[str, Any]]
    verdicts: list[Verdict] = field(default_factory=list)
    error: BaseException | None = None
    done: bool = False


class VerifierPool:
    """Runs a verifier over batches of completions.

    workers=0 calls it in this process: right for exact, bounded verifiers (countdown, exact), where it takes
    microseconds; neither limit holds there. Otherwise ``workers`` fresh Python processes share the work. They are
    started with exec, never forked: the trainer has torch and collective threads, and a fork would copy their locks.

    A verifier's ``warm_up()``, if it has one, is called once in each worker before any item.
    timeout_s: seconds an item may take. memory_mb: MiB of data memory a worker may use, itself included.
    An item that goes beyond either, raises, or kills its worker gets reward 0.0 and its status; the worker is
    replaced and the rest of the batch goes on. ``counts`` holds how many items ended with each status.
    """

    def __init__(
        self, verifier: Callable[[str, Any], float], workers: int = 0, timeout_s: float = 10.0, memory_mb: int = 2048
    ) -> None:
        """Start the workers (without waiting for them). Raises UserError for impossible limits or a verifier that
        cannot be sent to another process.
        """
        if workers < 0:
            raise UserError(f"verifier workers must be 0 (in this process) or more, found {workers}")
        if not timeout_s > 0 or not math.isfinite(timeout_s):
            raise UserError(f"the verifier's timeout must be a positive number of seconds, found {timeout_s}")
        if memory_mb < 64:
            raise UserError(f"the verifier's memory limit must be at least 64 MiB, found {memory_mb}")
        self.verifier = verifier
        self.timeout_s = timeout_s
        self.memory_mb = memory_mb
        self.counts: collections.Counter[str] = collections.Counter(dict.fromkeys(STATUSES, 0))
        self._warned: set[str] = set()
        self._waiting: list[_Batch] = []
        self._waiting_lock = threading.Lock()
        self._turn = threading.Lock()
        self._setup = _pickled_setup(verifier, timeout_s, memory_mb) if workers else b""
        self._workers = [_Worker(self._setup) for _ in range(workers)]
        self._closed = False

    def verify(self, completions: list[str], answers: list[Any]) -> list[Verdict]:
        """One verdict a completion, in the order given.

        Several threads may call it. What comes while another batch is verified is then verified together: an item that
        hangs costs all of them its timeout once.

        Raises UserError if the verifier does (an answer of the wrong form: every run would fail on it), RuntimeError
        if workers cannot be started.
        """
        if len(completions) != len(answers):
            raise ValueError(f"{len(completions)} completions but {len(answers)} answers")
        batch = _Batch(list(zip(completions, answers, strict=True)))
        with self._waiting_lock:
            self._waiting.append(batch)
        with self._turn:
            if not batch.done:
                with self._waiting_lock:
                    together, self._waiting = self._waiting, []
                try:
                    verdicts = self._verify_items([item for one in together for item in one.items])
                except BaseException as error:
                    for one in together:
                        one.error = error
                else:
                    for one in together:
                        one.verdicts, verdicts = verdicts[: len(one.items)], verdicts[len(one.items) :]
                for one in together:
                    one.done = True
        if batch.error is not None:
            raise batch.error
        return batch.verdicts

    def _verify_items(self, items: list[tuple[str, Any]]) -> list[Verdict]:
        if self._closed:
            raise RuntimeError("this VerifierPool is closed")
        if self._workers:
            try:
                verdicts = self._verify_in_workers(items)
            except BaseException:
                # Replies to this batch are still under way: another batch on these workers would get them.
                self.close()
                raise
        else:
            verdicts = [judge(self.verifier, text, answer) for text, answer in items]
        self.counts.update(verdict.status for verdict in verdicts)
        for verdict in verdicts:
            if verdict.status != "ok" and verdict.status not in self._warned:
                self._warned.add(verdict.status)
                logger.warning(
                    "a completion was not verified (%s): %s; reward 0 (said once; VerifierPool.counts has them all)",
                    verdict.status,
                    verdict.detail,
                )
        return verdicts

    def close(self) -> None:
        """End the workers. The pool cannot be used afterwards."""
        self._closed = True
        for worker in self._workers:
            worker.kill()
        self._workers = []

    def __enter__(self) -> "VerifierPool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _verify_in_workers(self, items: list[tuple[str, Any]]) -> list[Verdict]:
        verdicts: list[Verdict | None] = [None] * len(items)
        size = max(1, min(_CHUNK, math.ceil(len(items) / (4 * len(self._workers)))))
        waiting = collections.deque(list(range(i, min(i + size, len(items)))) for i in range(0, len(items), size))
        unfinished = len(items)
        with selectors.DefaultSelector() as selector:
            for slot, worker in enumerate(self._workers):
                selector.register(worker.socket, selectors.EVENT_READ, slot)
            while unfinished:
                for worker in self._workers:
                    if not worker.pending and waiting and worker.ready:
                        chunk = waiting.popleft()
                        worker.send(chunk, [items[index] for index in chunk], self.timeout_s)
                now = time.monotonic()
                patience = min(worker.deadline for worker in self._workers) - now
                readable = {key.data for key, _ in selector.select(max(0.0, min(patience, 3600.0)))}
                now = time.monotonic()
                for slot, worker in enumerate(self._workers):
                    failure = None
                    if slot in readable:
                        for index, verdict in worker.receive(self.timeout_s):
                            verdicts[index] = verdict
                            unfinished -= 1
                        if worker.gone:
                            failure = Verdict(0.0, "crash", "the worker process died")
                    elif now >= worker.deadline:
                        failure = Verdict(0.0, "timeout", f"no verdict within {self.timeout_s:g} s")
                    if failure is not None:
                        if not worker.ready:
                            raise RuntimeError(
                                "a verifier worker died while starting"
                                if worker.gone
                                else f"a verifier worker did not start within {_START_TIMEOUT_S:.0f} s"
                            )
                        # The item it was on is to blame; those behind it in the chunk are not.
                        if worker.pending:
                            verdicts[worker.pending.popleft()] = failure
                            unfinished -= 1
                        if worker.pending:
                            waiting.appendleft(list(worker.pending))
                        selector.unregister(worker.socket)
                        worker.kill()
                        self._workers[slot] = _Worker(self._setup)
                        selector.register(self._workers[slot].socket, selectors.EVENT_READ, slot)
        return [verdict for verdict in verdicts if verdict is not None]


def judge(verifier: Callable[[str, Any], float], completion: str, answer: Any) -> Verdict:
    """Call a verifier and turn whatever happens into a Verdict; only UserError passes through."""
    try:
        reward = float(verifier(completion, answer))
    except UserError:
        raise
    except MemoryError:
        return Verdict(0.0, "memory", "the verifier asked for more memory than its limit")
    except Exception as error:  # a user's function may raise anything, and none of it may end the run
        return Verdict(0.0, "error", f"{type(error).__name__}: {error}")
    if not math.isfinite(reward):
        return Verdict(0.0, "error", f"the verifier returned {reward}")
    return Verdict(reward, "ok")


def _pickled_setup(verifier: Callable[[str, Any], float], timeout_s: float, memory_mb: int) -> bytes:
    function = getattr(verifier, "func", verifier)
    if getattr(function, "__module__", None) == "__main__":
        raise UserError("a verifier defined in the main script cannot reach worker processes; move it to a module")
    try:
        return pickle.dumps((memory_mb, timeout_s, pickle.dumps(verifier)))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise UserError(
            f"the verifier cannot be sent to worker processes ({error}); use a module-level function, or workers=0"
        ) from error


class _Worker:
    """One worker process, seen from the pool."""

    def __init__(self, setup: bytes) -> None:
        self.socket, theirs = socket.socketpair()
        environment = dict(os.environ)
        # The same modules must be importable there, from the same places, the user's own among them.
        environment["PYTHONPATH"] = os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path)
        environment["OMP_NUM_THREADS"] = "1"
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "megatron_rlvr.verifiers.worker", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=sys.stderr.fileno() if _has_fileno(sys.stderr) else subprocess.DEVNULL,
                env=environment,
                # Its own process group: children that a verifier starts end with it, and Ctrl-C reaches only us.
                start_new_session=True,
            )
        self.reader = FrameReader(self.socket)
        self.ready = False
        self.gone = False
        self.pending: collections.deque[int] = collections.deque()
        self.deadline = time.monotonic() + _START_TIMEOUT_S
        self.socket.settimeout(_START_TIMEOUT_S)
        send_frame(self.socket, setup)

    def send(self, indices: list[int], items: list[tuple[str, Any]], timeout_s: float) -> None:
        self.pending.extend(indices)
        self.deadline = time.monotonic() + timeout_s
        try:
            send_frame(self.socket, pickle.dumps(items))
        except OSError:
            # It died between two chunks; receive() will see the end of the stream and name the first item.
            self.gone = True

    def receive(self, timeout_s: float) -> list[tuple[int, Verdict]]:
        """The verdicts that have arrived; sets ``gone`` at the end of the stream and ``ready`` after start-up."""
        frames = self.reader.read_available()
        self.gone = self.reader.ended
        results = []
        for frame in frames:
            reply = pickle.loads(frame)
            if isinstance(reply, UserError):
                raise reply
            if reply is None:
                self.ready = True
            else:
                results.append((self.pending.popleft(), Verdict(*reply)))
            self.deadline = time.monotonic() + timeout_s
        if self.ready and not self.pending:
            self.deadline = math.inf
        return results

    def kill(self) -> None:
        self.socket.close()
        # The group, for children the verifier may have started; it is gone if the worker has died and left none.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def _has_fileno(stream: Any) -> bool:
    try:
        stream.fileno()
    except (AttributeError, OSError, ValueError):
        return False
    return True
