"""``status.json`` of a run directory: what the run is doing now. The file is complete whenever it is read."""

from __future__ import annotations

import json
import math
import os
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

from megatron_rlvr.atomic_write import write_text
from megatron_rlvr.checked_input import InvalidInputError, field, parse_object, read_bytes
from megatron_rlvr.errors import UserError
from megatron_rlvr.telemetry.time_left import PeriodicWork, TimeLeft

STATUS_FILE = "status.json"


@dataclass
class Status:
    """The content of ``status.json``. Values that are not known yet are None.

    Attributes:
        steps: number of steps of the run.
        state: ``running``, ``done``, ``stopped`` (resumable), or ``failed``.
        phase: what the step in progress is doing.
        reason: why the run failed.
        step: number of finished steps.
        reward, entropy, entropy_target: values of the last finished step. Entropies are in nats per token; the target
            is None unless the schedule has one.
        tokens_per_second: response tokens of the last step by its duration, including evaluation and checkpoint.
        step_seconds: mean duration of the last steps, with evaluations and checkpoints.
        seconds_left: expected time until the end of the run, with its evaluations and checkpoints.
        checkpoint: number of steps in the newest complete checkpoint.
        updated: when the file was written, in seconds since 1970.
        slurm_job: id of the Slurm job.
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
    """Keeps ``status.json`` of a run up to date. One process of a run owns one writer.

    Args:
        run_directory: must exist.
        name: name of the run.
        steps: number of steps of the run.
        first_step: the step that this process begins with. If it is not 0, a checkpoint of that step exists.
        history: records of the steps before it.
        work: when the run evaluates and saves.
    """

    def __init__(
        self,
        run_directory: Path,
        name: str,
        steps: int,
        first_step: int,
        history: Sequence[Mapping[str, Any]] = (),
        work: PeriodicWork | None = None,
    ) -> None:
        self._path = run_directory / STATUS_FILE
        self.status = Status(name, steps, step=first_step, checkpoint=first_step or None)
        self.status.host, self.status.pid = socket.gethostname(), os.getpid()
        self.status.slurm_job = os.environ.get("SLURM_JOB_ID")
        self._time_left = TimeLeft(steps, work, history)
        self._write()

    def phase(self, name: str) -> None:
        self.status.phase = name
        self.status.seconds_left = self._time_left.now()
        self._write()

    def step(self, record: Mapping[str, Any]) -> None:
        """Update the status from the record of a finished step."""
        seconds = self._time_left.step_ended(record)
        status = self.status
        status.step = int(record["step"]) + 1
        status.reward, status.entropy = _finite(record.get("reward")), _finite(record.get("entropy"))
        status.entropy_target = _finite(record.get("control/target"))
        status.tokens_per_second = _finite(record.get("tokens", math.nan) / seconds)
        status.step_seconds = self._time_left.mean_step()
        status.seconds_left = self._time_left.at_last_end()
        self._write()

    def saved(self, step: int) -> None:
        """Record that the checkpoint of `step` steps is complete."""
        self.status.checkpoint = step
        self._write()

    def ended(self, state: str, reason: str | None = None) -> None:
        """Record how this process ended: ``done``, ``stopped`` or ``failed``."""
        self.status.state, self.status.phase, self.status.reason = state, "", reason
        if state == "done":
            self.status.seconds_left = 0.0
        self._write()

    def _write(self) -> None:
        self.status.updated = time.time()
        # Not flushed to disk: the file is rewritten several times per step, and losing a status does no harm.
        write_text(self._path, json.dumps(asdict(self.status), allow_nan=False) + "\n", flush_to_disk=False)


def read_status(run_directory: Path) -> Status:
    """The status of a run.

    Raises:
        UserError: when the directory has no status, or the file cannot be read as one.
    """
    path = run_directory / STATUS_FILE
    try:
        record = parse_object(read_bytes(path))
        for name, hint in get_type_hints(Status).items():
            kind, *others = get_args(hint) or (hint,)
            if not (record.get(name) is None and others):
                limits = {"at_least": 0, "at_most": 2**53} if kind is int else {}
                field(record, name, kind, **limits, default=getattr(Status, name, None))
        return Status(**record)
    except FileNotFoundError:
        raise UserError(f"no {STATUS_FILE} in {run_directory}: give the directory of a run that has started") from None
    except (OSError, InvalidInputError, TypeError) as error:  # TypeError: it has other fields
        raise UserError(f"{path} is not the status of a run ({str(error)[:200]})") from error


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
