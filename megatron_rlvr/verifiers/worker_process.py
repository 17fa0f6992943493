"""A verifier worker process, as the pool sees it."""

import collections
import contextlib
import math
import os
import pickle
import select
import signal
import socket
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_rlvr.errors import UserError
from megatron_rlvr.verifiers.channel import LONGEST_REPLY, FrameReader, ProtocolError, Reply, decoded, frame
from megatron_rlvr.verifiers.descendants import MARK_VARIABLE, kill_descendants
from megatron_rlvr.verifiers.verdict import Verdict

# A worker imports its verifier in a second or two on an idle machine, but takes longer if a node starts 64 at once.
_START_TIMEOUT_S = 120.0
_END_TIMEOUT_S = 10.0
_LOOK_AGAIN_S = 0.1


@dataclass(frozen=True)
class WorkerFailure:
    """How a worker failed.

    Attributes:
        verdict: of the item that it worked on.
        item_is_suspect: whether that item may be the cause. It is not if the worker had not begun it, was stopped, or
            sent something that is no reply; then the item is worth another try.
        while_starting: whether the worker had not loaded the verifier yet.
    """

    verdict: Verdict
    item_is_suspect: bool
    while_starting: bool


class WorkerProcess:
    """One worker process: a fresh Python interpreter that runs ``megatron_rlvr.verifiers.worker``.

    Nothing here blocks, whatever the process does.

    Attributes:
        ready: whether the worker has loaded the verifier.
        pending: indices of the items sent to the worker without a reply yet; it works on the first.
        deadline: when the worker counts as hung, on the monotonic clock. Time in which it waits for a processor is
            added, so that a correct completion does not lose its reward because other programs use the machine.
    """

    def __init__(self, setup: bytes, timeout_s: float) -> None:
        """Start the process without waiting for it. ``timeout_s`` is the time limit of one item."""
        self.socket, workers_socket = socket.socketpair()
        self.socket.setblocking(False)
        self._mark = uuid.uuid4().hex
        environment = dict(os.environ)
        # Modules, the user's own included, must be importable in the worker from the same places.
        environment["PYTHONPATH"] = os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path)
        environment["OMP_NUM_THREADS"] = "1"
        environment[MARK_VARIABLE] = self._mark
        with workers_socket:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "megatron_rlvr.verifiers.worker", str(workers_socket.fileno())],
                pass_fds=[workers_socket.fileno()],
                stdin=subprocess.DEVNULL,
                # Output of verifiers goes to stderr: on stdout it would break the trainer's progress display.
                stdout=sys.stderr.fileno() if _has_fileno(sys.stderr) else subprocess.DEVNULL,
                env=environment,
                # In its own session, Ctrl-C reaches only the trainer.
                start_new_session=True,
            )
        self.ready = False
        self.pending: collections.deque[int] = collections.deque()
        self._accepted = False
        self._timeout_s = timeout_s
        self._reader = FrameReader(self.socket, LONGEST_REPLY)
        self._unsent = memoryview(b"")
        self._gone = False
        self._violation = ""
        self._queued_s = 0.0
        self._ran_s: float | None = None  # at the last look after the deadline
        self.deadline = time.monotonic() + _START_TIMEOUT_S
        self._send(setup)

    @property
    def sending(self) -> bool:
        """Whether part of a message waits for the worker to read."""
        return len(self._unsent) > 0

    def send(self, indices: list[int], items: list[tuple[str, Any]]) -> None:
        """Send items to a worker that is ready and idle; ``indices`` number the items of the pool."""
        self.pending.extend(indices)
        self._accepted = False
        self._start_limit()
        self._send(pickle.dumps((indices, items)))

    def send_more(self) -> None:
        """Send as much of the message as the worker has room for."""
        try:
            sent = self.socket.send(self._unsent)
        except BlockingIOError:
            return
        except OSError:
            self._gone = True
            self._unsent = memoryview(b"")
            return
        self._unsent = self._unsent[sent:]
        if self.ready:  # a long message takes its time as long as the worker reads
            self._start_limit()

    def receive(self) -> list[Reply]:
        """Read from the socket once and return the verdicts that have arrived.

        Raises:
            UserError: if the worker reports one.
        """
        verdicts: list[Reply] = []
        if self._violation:
            return verdicts
        try:
            for payload in self._reader.read_available():
                reply = decoded(payload)
                self._check_order(reply)
                if reply.kind == "refused":
                    raise UserError(" ".join(reply.detail.split()))
                if reply.kind == "ready":
                    self.ready = True
                elif reply.kind == "accepted":
                    self._accepted = True
                else:
                    verdicts.append(reply)
                    self.pending.popleft()
                self._start_limit()
        except ProtocolError as error:
            self._violation = str(error)
        self._gone = self._gone or self._reader.ended
        if self.ready and not self.pending:
            self.deadline = math.inf
        return verdicts

    def _check_order(self, reply: Reply) -> None:
        if reply.kind == "refused":
            expected = not self.ready or (bool(self.pending) and self._accepted)
        elif reply.kind == "ready":
            expected = not self.ready
        elif reply.kind == "accepted":
            expected = bool(self.pending) and not self._accepted and reply.index == self.pending[0]
        else:
            expected = bool(self.pending) and self._accepted and reply.index == self.pending[0]
        if not expected:
            raise ProtocolError(f"an unexpected reply of kind {reply.kind} for item {reply.index}")

    def failure(self) -> WorkerFailure | None:
        """Return how the worker has failed, if it has died, broken the protocol, or exceeded its time limit."""
        if self._violation:
            verdict = Verdict(0.0, "crash", f"the worker process sent {self._violation}")
            return WorkerFailure(verdict, item_is_suspect=False, while_starting=not self.ready)
        # If a process that the verifier forked holds the socket open, the death of the worker does not close it.
        if self._gone or (self.process.poll() is not None and not self._readable()):
            verdict = Verdict(0.0, "crash", "the worker process died")
            if self._accepted and self._ended_by_timer():
                verdict = self._timeout()
            return WorkerFailure(verdict, item_is_suspect=self._accepted, while_starting=not self.ready)
        if not self._expired():
            return None
        verdict = self._timeout()
        suspect = self._accepted and not self._stopped()
        return WorkerFailure(verdict, item_is_suspect=suspect, while_starting=not self.ready)

    def _send(self, payload: bytes) -> None:
        self._unsent = memoryview(frame(payload))
        self.send_more()

    def _start_limit(self) -> None:
        """Start the time limit of the next item."""
        self.deadline = time.monotonic() + self._timeout_s
        self._queued_s, self._ran_s = _processor_seconds(self.process.pid)[1], None

    def _expired(self) -> bool:
        """Whether the time limit has passed and no reply waits to be read; moves the deadline by time in the queue.

        Linux adds the time in the queue when it ends. So a process that is ready to run, and has not run since the last
        look, is still in the queue, and is looked at again.
        """
        if time.monotonic() < self.deadline:
            return False
        ran_s, queued_s = _processor_seconds(self.process.pid)
        self.deadline += queued_s - self._queued_s
        self._queued_s = queued_s
        if time.monotonic() < self.deadline or self._readable():
            return False
        if self._state() == "R" and self._ran_s in (None, ran_s):
            self._ran_s, self.deadline = ran_s, time.monotonic() + _LOOK_AGAIN_S
            return False
        return True

    def _readable(self) -> bool:
        poll = select.poll()  # unlike select, it takes descriptors above 1023
        poll.register(self.socket, select.POLLIN)
        return bool(poll.poll(0))

    def _timeout(self) -> Verdict:
        limit = self._timeout_s if self.ready else _START_TIMEOUT_S
        return Verdict(0.0, "timeout", f"no verdict within {limit:g} s")

    def _ended_by_timer(self) -> bool:
        """Whether the worker's own timer ended the process, which closed its socket.

        Unlike the pool, the timer counts time without a processor, so it may come first on a busy machine.
        """
        if self.process.poll() is None:
            self.process.kill()  # a process that is ending keeps its status
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(_END_TIMEOUT_S)
        return self.process.returncode == -signal.SIGALRM

    def _stopped(self) -> bool:
        """Whether a signal has stopped the process, such as SIGSTOP."""
        return self._state() in ("T", "t")

    def _state(self) -> str:
        """The state of the process, a letter as in proc(5); empty where it is not known."""
        try:
            stat = Path(f"/proc/{self.process.pid}/stat").read_text()
        except OSError:
            return ""
        return stat.rpartition(")")[2].split()[0]

    def kill(self) -> None:
        """Kill the process and all processes that its verifier started, and wait for the process to end."""
        self.socket.close()
        kill_descendants(self.process.pid, self._mark, including_ancestor=self.process.returncode is None)
        # A process that is stuck in the kernel does not end; it must not hold up the others.
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(_END_TIMEOUT_S)


def _processor_seconds(pid: int) -> tuple[float, float]:
    """Seconds that a process has run, and been ready to run without a processor; 0 where Linux does not record them."""
    try:
        ran, queued = Path(f"/proc/{pid}/schedstat").read_text().split()[:2]
    except (OSError, ValueError):
        return 0.0, 0.0
    return int(ran) * 1e-9, int(queued) * 1e-9


def _has_fileno(stream: Any) -> bool:
    try:
        stream.fileno()
    except (AttributeError, OSError, ValueError):
        return False
    return True
