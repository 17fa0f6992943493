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
from pathlib import Path
from typing import Any

from megatron_rlvr.errors import UserError
from megatron_rlvr.verifiers.channel import FrameReader, send_frame
from megatron_rlvr.verifiers.verdict import Verdict

# A worker imports its verifier in a second or two on an idle machine, but takes longer if a node starts 64 at once.
_START_TIMEOUT_S = 120.0


class WorkerProcess:
    """One worker process: a fresh Python interpreter that runs ``megatron_rlvr.verifiers.worker``.

    Attributes:
        ready: whether the worker has loaded the verifier.
        pending: indices of the items sent to the worker without a reply yet; it works on the first.
        deadline: when the worker counts as hung, on the monotonic clock. Time in which it waits for a processor is
            added, so that a correct completion does not lose its reward because other programs use the machine.
    """

    def __init__(self, setup: bytes, timeout_s: float) -> None:
        """Start the process without waiting for it. ``timeout_s`` is the time limit of one item."""
        self.socket, workers_socket = socket.socketpair()
        environment = dict(os.environ)
        # Modules, the user's own included, must be importable in the worker from the same places.
        environment["PYTHONPATH"] = os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path)
        environment["OMP_NUM_THREADS"] = "1"
        with workers_socket:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "megatron_rlvr.verifiers.worker", str(workers_socket.fileno())],
                pass_fds=[workers_socket.fileno()],
                stdin=subprocess.DEVNULL,
                # Output of verifiers goes to stderr: on stdout it would break the trainer's progress display.
                stdout=sys.stderr.fileno() if _has_fileno(sys.stderr) else subprocess.DEVNULL,
                env=environment,
                # In its own process group, child processes of a verifier are killed with it, and Ctrl-C reaches only
                # the trainer.
                start_new_session=True,
            )
        self.ready = False
        self.pending: collections.deque[int] = collections.deque()
        self._timeout_s = timeout_s
        self._reader = FrameReader(self.socket)
        self._gone = False
        self.deadline = time.monotonic() + _START_TIMEOUT_S
        self._queued_s = 0.0
        self.socket.settimeout(_START_TIMEOUT_S)
        send_frame(self.socket, setup)

    def send(self, indices: list[int], items: list[tuple[str, Any]]) -> None:
        """Send items to a worker that is ready and idle; ``indices`` are their positions in the batch."""
        self.pending.extend(indices)
        self._start_limit()
        try:
            send_frame(self.socket, pickle.dumps(items))
        except OSError:
            self._gone = True

    def receive(self) -> list[tuple[int, Verdict]]:
        """Read from the socket once and return the verdicts that have arrived, with their indices.

        Raises:
            UserError: if the worker reports one.
        """
        frames = self._reader.read_available()
        self._gone = self._reader.ended
        results = []
        for frame in frames:
            reply = pickle.loads(frame)
            if isinstance(reply, UserError):
                raise reply
            if reply is None:
                self.ready = True
            else:
                results.append((self.pending.popleft(), Verdict(*reply)))
            self._start_limit()
        if self.ready and not self.pending:
            self.deadline = math.inf
        return results

    def failure(self) -> Verdict | None:
        """Return the verdict of the item in progress if the worker has died or exceeded its time limit, else None.

        Raises:
            RuntimeError: if the worker died, or exceeded the time limit of its start, before it was ready.
        """
        if not (self._gone or self._expired()):
            return None
        if not self.ready:
            raise RuntimeError(
                "a verifier worker died while starting"
                if self._gone
                else f"a verifier worker did not start within {_START_TIMEOUT_S:.0f} s"
            )
        if self._gone:
            return Verdict(0.0, "crash", "the worker process died")
        return Verdict(0.0, "timeout", f"no verdict within {self._timeout_s:g} s")

    def _start_limit(self) -> None:
        """Start the time limit of the next item."""
        self.deadline = time.monotonic() + self._timeout_s
        self._queued_s = _queued_seconds(self.process.pid)

    def _expired(self) -> bool:
        """Whether the time limit has passed and no reply waits to be read; moves the deadline by time in the queue."""
        if time.monotonic() < self.deadline:
            return False
        queued_s = _queued_seconds(self.process.pid)
        self.deadline += queued_s - self._queued_s
        self._queued_s = queued_s
        return time.monotonic() >= self.deadline and not select.select([self.socket], [], [], 0)[0]

    def kill(self) -> None:
        """Kill the process and the child processes that its verifier started, and wait for the process to end."""
        self.socket.close()
        # The group no longer exists if the worker has died and left no children.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def _queued_seconds(pid: int) -> float:
    """How long a process has been ready to run without a processor, in seconds; 0 where Linux does not record it."""
    try:
        return int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]) * 1e-9
    except (OSError, IndexError):
        return 0.0


def _has_fileno(stream: Any) -> bool:
    try:
        stream.fileno()
    except (AttributeError, OSError, ValueError):
        return False
    return True
