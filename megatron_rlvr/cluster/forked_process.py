"""Work in a forked process, which can be killed if it hangs and has a CUDA context of its own."""

from __future__ import annotations

import json
import os
import select
import signal
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_rlvr.errors import UserError


class ForkedProcessError(Exception):
    """A forked process failed, died or hung; the message says which."""


@dataclass(frozen=True)
class ForkedProcess:
    """A process that `fork` started. Its result arrives through `pipe`."""

    pid: int
    pipe: int

    def result(self, deadline: float) -> Any:
        """Wait for the process and return what its work returned.

        Args:
            deadline: time, on the monotonic clock, at which a process without a result is killed.

        Raises:
            UserError: if the work raised it.
            ForkedProcessError: if the work raised anything else, or the process died or missed the deadline.
        """
        with os.fdopen(self.pipe, "rb") as file:
            poll = select.poll()  # select() fails for a descriptor above 1023
            poll.register(file, select.POLLIN)
            ready = poll.poll(1000 * max(0.0, deadline - time.monotonic()))
            text = file.read() if ready else b""
        if not text:
            os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        if not text:
            raise ForkedProcessError("it died" if ready else "it did not end in time")
        kind, value = json.loads(text)
        if kind == "user error":
            raise UserError(value)
        if kind == "error":
            raise ForkedProcessError(value)
        return value


def fork(work: Callable[[], Any]) -> ForkedProcess:
    """Run `work` in a fork of this process, which must not have used CUDA.

    A fork has the modules that this process has imported, so it starts at once. The result of `work` must be JSON
    serializable.
    """
    reader, writer = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writer)
        return ForkedProcess(pid, reader)
    os.close(reader)
    message: tuple[str, Any]
    try:
        import torch

        # OpenMP hangs in a fork of a process that has used its threads. With one thread torch does not call OpenMP.
        torch.set_num_threads(1)
        message = ("result", work())
    except UserError as error:
        message = ("user error", str(error))
    except BaseException as error:
        traceback.print_exc()
        message = ("error", f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}")
    with os.fdopen(writer, "w") as file:
        file.write(json.dumps(message))
    os._exit(0)
