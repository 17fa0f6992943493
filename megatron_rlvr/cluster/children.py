"""Work in a forked process, which can be killed when it hangs, and whose CUDA context is its own."""

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


class ChildError(Exception):
    """A child that failed, died or hung; the message says which."""


@dataclass(frozen=True)
class Child:
    """A process at work, from `start`."""

    pid: int
    pipe: int

    def result(self, deadline: float) -> Any:
        """What its work returned; a child that has no result at `deadline` (`time.monotonic`) is killed.

        Raises:
            UserError: that the work raised.
            ChildError: when it failed otherwise, died, or did not end in time.
        """
        with os.fdopen(self.pipe, "rb") as file:
            ready, _, _ = select.select([file], [], [], max(0.0, deadline - time.monotonic()))
            text = file.read() if ready else b""
        if not text:
            os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        if not text:
            raise ChildError("it died" if ready else "it did not end in time")
        kind, value = json.loads(text)
        if kind == "refused":
            raise UserError(value)
        if kind == "failed":
            raise ChildError(value)
        return value


def start(work: Callable[[], Any]) -> Child:
    """Do `work`, whose result JSON can hold, in a child, which has all imports. CUDA must be untouched here."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writer)
        return Child(pid, reader)
    os.close(reader)
    told: tuple[str, Any]
    try:
        import torch

        # OpenMP hangs in a fork of a process that has used its threads. With one thread torch does not call OpenMP.
        torch.set_num_threads(1)
        told = ("done", work())
    except UserError as error:
        told = ("refused", str(error))
    except BaseException as error:
        traceback.print_exc()
        told = ("failed", f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}")
    with os.fdopen(writer, "w") as file:
        file.write(json.dumps(told))
    os._exit(0)
