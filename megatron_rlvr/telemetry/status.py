"""``status.json`` of a run directory: what the run is doing now, small, and whole whenever it is read."""

from __future__ import annotations

import json
import math
import os
import socket
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_rlvr.atomic_write import write_text
from megatron_rlvr.errors import UserError

STATUS_FILE = "status.json"
# Steps whose mean time predicts the time left, as the progress display has it.
_RECENT_STEPS = 10


@dataclass
class Status:
    """What ``status.json`` holds; None where nothing is known yet.

    Attributes:
        state: ``running``, ``done``, ``stopped`` (resumable), or ``failed`` with the `reason`.
        phase: of the step in progress.
        step, steps: finished steps, and those of the whole run.
        entropy, entropy_target: nats per token, of the last finished step; the target where the schedule has one.
        tokens_per_second: response tokens of the last step over its time, evaluation and checkpoint included.
        step_seconds, seconds_left: mean of the last steps; what it means for the rest of the run.
        checkpoint: steps that the newest checkpoint holds.
        updated: seconds since 1970.
    """

    name: str
    steps: int
    state: str = "running"
    phase: str = "starting"
    reason: str | None = None
    step: int = 0
    reward: float | None = None
    entropy: float | None = None
    entropy_target: float | None = None
    tokens_per_second: float | None = None
    step_seconds: float | None = None
    seconds_left: float | None = None
    checkpoint: int | None = None
    updated: float = 0.0
    host: str = ""
    pid: int = 0
    slurm_job: str | None = None


class StatusWriter:
    """Keeps ``status.json`` of a run; one process of a run owns one.

    Args:
        run_directory: exists already.
        name, steps: of the run.
        first_step: the step that this process begins with, whose checkpoint is there when it is not 0.
    """

    def __init__(self, run_directory: Path, name: str, steps: int, first_step: int) -> None:
        self._path = run_directory / STATUS_FILE
        self.status = Status(name, steps, step=first_step, checkpoint=first_step or None)
        self.status.host, self.status.pid = socket.gethostname(), os.getpid()
        self.status.slurm_job = os.environ.get("SLURM_JOB_ID")
        self._seconds: deque[float] = deque(maxlen=_RECENT_STEPS)
        self._last = time.monotonic()
        self._write()

    def phase(self, name: str) -> None:
        self.status.phase = name
        self._write()

    def step(self, record: Mapping[str, Any]) -> None:
        """Take in the record of a finished step."""
        now = time.monotonic()
        seconds, self._last = now - self._last, now
        self._seconds.append(seconds)
        status = self.status
        status.step = int(record["step"]) + 1
        status.reward, status.entropy = _finite(record.get("reward")), _finite(record.get("entropy"))
        status.entropy_target = _finite(record.get("control/target"))
        status.tokens_per_second = _finite(record.get("tokens", math.nan) / seconds)
        status.step_seconds = sum(self._seconds) / len(self._seconds)
        status.seconds_left = status.step_seconds * (status.steps - status.step)
        self._write()

    def saved(self, step: int) -> None:
        """A checkpoint of `step` steps is whole."""
        self.status.checkpoint = step
        self._write()

    def ended(self, state: str, reason: str | None = None) -> None:
        """The last word of this process: ``done``, ``stopped`` or ``failed``."""
        self.status.state, self.status.phase, self.status.reason = state, "", reason
        if state == "done":
            self.status.seconds_left = 0.0
        self._write()

    def _write(self) -> None:
        self.status.updated = time.time()
        # Rewritten several times per step: waiting for the disk each time would cost more than a lost status.
        write_text(self._path, json.dumps(asdict(self.status), allow_nan=False) + "\n", flush_to_disk=False)


def read_status(run_directory: Path) -> Status:
    """The status of a run.

    Raises:
        UserError: when the directory has none, or the file is not one.
    """
    path = run_directory / STATUS_FILE
    try:
        return Status(**json.loads(path.read_text()))
    except FileNotFoundError:
        raise UserError(f"no {STATUS_FILE} in {run_directory}: give the directory of a run that has started") from None
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is no status of a run ({error})") from error


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
