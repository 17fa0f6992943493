"""Where a run's scalars go besides the JSON files: TensorBoard and W&B."""

from __future__ import annotations

import os
import re
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from megatron_rlvr.atomic_write import write_text
from megatron_rlvr.checked_input import one_line, shown
from megatron_rlvr.errors import UserError

_RUN_ID = re.compile(r"[\w-]{1,128}", re.ASCII)


class Sink(Protocol):
    """Receives every record, a flat dict of plain numbers with the step under "step"."""

    def write(self, record: Mapping[str, Any]) -> None: ...
    def close(self) -> None: ...


class TensorBoard:
    """Writes scalars to TensorBoard event files.

    The first event of a resumed run is the one that ``SummaryWriter(purge_step=resume_step)`` writes: TensorBoard then
    drops what earlier attempts logged from that step on. This class replaces SummaryWriter because SummaryWriter
    imports torch, which the tools that read metrics avoid, and writes one event per scalar instead of one per step:
    with 60 scalars, 3.2 KB and 2.4 ms per step against 1.5 KB and 0.3 ms (torch 2.13 on one CPU core).

    Args:
        directory: receives the event files; created if it does not exist.
        resume_step: first step of this process, None for a new run.
    """

    def __init__(self, directory: Path, resume_step: int | None) -> None:
        # Importing tensorboard takes a third of a second, so only runs that use it pay for it.
        from tensorboard.compat.proto import event_pb2, summary_pb2  # type: ignore[import-untyped]
        from tensorboard.summary.writer.record_writer import RecordWriter  # type: ignore[import-untyped]

        self._event, self._summary, self._session_log = event_pb2.Event, summary_pb2.Summary, event_pb2.SessionLog
        directory.mkdir(parents=True, exist_ok=True)
        now = time.time()
        # TensorBoard reads event files in the order of their names: those of later attempts must sort last.
        name = f"events.out.tfevents.{now:017.6f}.{os.getpid()}"
        self._records = RecordWriter((directory / name).open("wb"))
        self._write(self._event(wall_time=now, file_version="brain.Event:2"))
        if resume_step is not None:
            start = self._session_log(status=self._session_log.START)
            self._write(self._event(wall_time=now, step=resume_step, session_log=start))

    def write(self, record: Mapping[str, Any]) -> None:
        values = [
            self._summary.Value(tag=name, simple_value=value)
            for name, value in record.items()
            if name != "step" and isinstance(value, int | float)
        ]
        self._write(self._event(wall_time=time.time(), step=record["step"], summary=self._summary(value=values)))

    def _write(self, event: Any) -> None:
        self._records.write(event.SerializeToString())
        self._records.flush()

    def close(self) -> None:
        self._records.close()


class WeightsAndBiases:
    """Logs to a W&B run. A resumed run continues the W&B run of the same run directory.

    W&B drops what is logged at a step below the last one, and a resumed W&B run begins after its last row. Therefore

    - an evaluation waits for the metrics of its step, and both become one row. The evaluation at the end of a run comes
      before the metrics of the last step and becomes a row of its own, after them.
    - if such a run is continued, the metrics of that step cannot be added to this row: they and all later rows move by
      one. ``wandb_evaluation_rows`` in the run directory lists the steps that have a row with an evaluation alone.
    - rows that an interrupted process logged after the checkpoint are logged again; W&B drops the repetition.

    Args:
        run_directory: holds ``wandb_run_id``, the id of the W&B run, and ``wandb_evaluation_rows``.
        settings: keyword arguments of ``wandb.init``.

    Raises:
        UserError: when wandb is not installed, refuses the run, or ``wandb_run_id`` does not hold an id.
    """

    def __init__(self, run_directory: Path, settings: Mapping[str, Any]) -> None:
        try:
            import wandb  # type: ignore[import-not-found, unused-ignore]
        except ImportError as error:
            raise UserError(
                "telemetry.wandb_project is set but wandb is not installed: pip install wandb, or set it to null"
            ) from error
        id_file = run_directory / "wandb_run_id"
        if not id_file.is_file():
            write_text(id_file, uuid.uuid4().hex[:16])
        run_id = read_run_id(id_file, "W&B")
        try:
            self._run = wandb.init(**{"dir": str(run_directory), "id": run_id, "resume": "allow", **settings})
        except wandb.errors.Error as error:
            raise UserError(
                f"telemetry.wandb_project={settings.get('project')}: W&B cannot be used ({one_line(error)}): run "
                "`wandb login`, set WANDB_MODE=offline, or set the project to null"
            ) from error
        self._alone_file = run_directory / "wandb_evaluation_rows"
        lines = self._alone_file.read_bytes().split() if self._alone_file.is_file() else []
        self._alone = {int(line) for line in lines if line.isdigit() and len(line) < 10}
        self._waiting: dict[int, dict[str, Any]] = {}

    def write(self, record: Mapping[str, Any]) -> None:
        step, values = record["step"], {name: value for name, value in record.items() if name != "step"}
        if all(name.startswith("evaluation/") for name in values):
            self._waiting[step] = values
            return
        self._run.log(self._waiting.pop(step, {}) | values, step=step + sum(other <= step for other in self._alone))
        self._log_waiting(after=step)

    def _log_waiting(self, after: int) -> None:
        """Log the evaluations that wait for metrics of steps beyond `after` as rows of their own."""
        for step in sorted(step for step in self._waiting if step > after):
            values = self._waiting.pop(step)
            if step not in self._alone:
                self._alone.add(step)
                write_text(self._alone_file, "".join(f"{other}\n" for other in sorted(self._alone)))
            self._run.log(values, step=step + sum(other < step for other in self._alone))

    def close(self) -> None:
        self._log_waiting(after=-1)
        self._run.finish()


def read_run_id(file: Path, service: str) -> str:
    """Read the id of a run at another service from a file of the run directory.

    Args:
        file: the file.
        service: name of the service, for the error.

    Raises:
        UserError: if the file cannot be read, or does not hold an id.
    """
    try:
        text = file.read_bytes()[:200].decode("ascii", "replace").strip()
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}): correct its permissions") from error
    if not _RUN_ID.fullmatch(text):
        raise UserError(
            f"{file} is damaged: found {shown(text)} instead of the id of a run; write the id that {service} shows for "
            "this run, or remove the file to begin a new run there"
        )
    return text
