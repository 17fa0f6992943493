"""The record of a run: ``metrics.jsonl``, ``evaluations.jsonl``, and the same scalars for TensorBoard and W&B.

A record is one flat dict, name -> number, with the step under "step"; docs/metrics.md lists the names. Both files
hold one JSON object a line. A run that was killed and resumed leaves the same files as one that was not.
"""

from __future__ import annotations

import json
import math
import os
import time
import uuid
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from megatron_rlvr.errors import UserError

METRICS_FILE = "metrics.jsonl"
EVALUATIONS_FILE = "evaluations.jsonl"

Record = dict[str, Any]


def is_wall_clock(name: str) -> bool:
    """Whether a metric depends on the machine's speed or memory, and so differs between equal runs."""
    return name.startswith(("time/", "memory/")) or name.endswith("per_second")


def deterministic(record: Mapping[str, Any]) -> Record:
    """The part of a record that two equal runs share bit for bit: all but the wall-clock metrics."""
    return {name: value for name, value in record.items() if not is_wall_clock(name)}


def read_metrics(path: str | os.PathLike[str]) -> list[Record]:
    """Read the records of a metrics or evaluations file, or of the ``metrics.jsonl`` of a run directory.

    A last line that a kill cut short is left out; null, which stands for a number that was not finite, reads as nan.
    Raises UserError when there is no such file or a whole line is no record.
    """
    file = Path(path)
    if file.is_dir():
        file = file / METRICS_FILE
    if not file.is_file():
        raise UserError(f"no metrics at {file}: give a run directory that holds {METRICS_FILE}, or such a file")
    return [record for record, _ in _records(file)]


class MetricsWriter:
    """Writes a run's records as they come; one process of a run owns one writer.

    resume_step is the first step this process will run, None for a new run. Lines of later attempts at that step and
    beyond are cut off, so call it only once the checkpoint to resume from is settled. An evaluation recorded at step s
    is of the policy after s steps, the one a checkpoint of step s holds: it is kept at s itself, and one written
    again takes its place, so evaluate either at the top of a step or before the checkpoint, never after it.
    wandb holds keyword arguments of ``wandb.init`` (project, entity, name, mode).
    Raises UserError when a new run meets the metrics of another, or when W&B is asked for and not installed.
    """

    def __init__(
        self,
        run_directory: str | os.PathLike[str],
        resume_step: int | None = None,
        *,
        tensorboard: bool = True,
        wandb: Mapping[str, Any] | None = None,
    ) -> None:
        directory = Path(run_directory)
        directory.mkdir(parents=True, exist_ok=True)
        self.metrics_path = directory / METRICS_FILE
        self.evaluations_path = directory / EVALUATIONS_FILE
        if resume_step is None:
            for path in (self.metrics_path, self.evaluations_path):
                if path.is_file() and path.stat().st_size:
                    raise UserError(f"{path} holds another run: resume that run, or choose a new run directory")
            self._last_step = None
        else:
            self._last_step = _cut(self.metrics_path, resume_step)
            _cut(self.evaluations_path, resume_step + 1)
            if resume_step > 0 and self._last_step != resume_step - 1:
                found = "is empty" if self._last_step is None else f"ends at step {self._last_step}"
                warnings.warn(f"{self.metrics_path} {found}, the run resumes at step {resume_step}", stacklevel=2)
        self._sinks: list[_Sink] = []
        if tensorboard:
            self._sinks.append(_TensorBoard(directory / "tensorboard", resume_step))
        if wandb is not None:
            self._sinks.append(_WeightsAndBiases(directory, wandb))

    def write(self, record: Mapping[str, Any]) -> None:
        """Append the record of one step and see it onto the disk; tensors and NumPy scalars become plain numbers.

        Raises ValueError when the record has no step or its step does not come after the last one.
        """
        plain = _plain(record)
        if self._last_step is not None and plain["step"] <= self._last_step:
            raise ValueError(f"metrics of step {plain['step']} written after those of step {self._last_step}")
        _append(self.metrics_path, plain)
        self._last_step = plain["step"]
        for sink in self._sinks:
            sink.write(plain)

    def write_evaluation(self, record: Mapping[str, Any]) -> None:
        """Append the evaluation of the policy after record["step"] steps, in place of an earlier one at that step."""
        plain = _plain(record)
        _cut(self.evaluations_path, plain["step"])
        _append(self.evaluations_path, plain)
        for sink in self._sinks:
            sink.write({name if name == "step" else f"evaluation/{name}": value for name, value in plain.items()})

    def close(self) -> None:
        for sink in self._sinks:
            sink.close()
        self._sinks.clear()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _plain(record: Mapping[str, Any]) -> Record:
    """The record with plain Python values; raises ValueError when it has no integer step."""
    plain = {name: value.item() if hasattr(value, "item") else value for name, value in record.items()}
    step = plain.get("step")
    if not isinstance(step, int) or isinstance(step, bool):
        raise ValueError(f"a record needs an integer 'step', found {step!r}")
    return plain


def _append(path: Path, record: Record) -> None:
    # JSON knows no nan and no infinity; null keeps the file readable for everything else that reads JSON.
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    line = json.dumps(finite, allow_nan=False) + "\n"
    with path.open("ab") as file:
        file.write(line.encode())
        file.flush()
        os.fsync(file.fileno())


def _records(path: Path) -> Iterator[tuple[Record, int]]:
    """The records of a file, each with the byte at which its line starts; a last line without newline is no record."""
    offset = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                record = json.loads(line)
            except ValueError as error:
                raise UserError(f"{path} line {number} is not JSON ({error}): correct or remove that line") from error
            if not isinstance(record, dict) or not isinstance(record.get("step"), int):
                raise UserError(f"{path} line {number} is no metrics record: expected an object with an integer 'step'")
            yield {name: math.nan if value is None else value for name, value in record.items()}, offset
            offset += len(line)


def _cut(path: Path, first_step: int) -> int | None:
    """Cut off a torn last line and the records from first_step on; the last step that stays, None when none does."""
    if not path.is_file():
        return None
    last, end = None, 0
    with path.open("r+b") as file:
        for record, offset in _records(path):
            if record["step"] >= first_step:
                end = offset
                break
            last = record["step"]
        else:
            # Keep all whole lines; what follows the last newline was torn by a kill.
            data = file.read()
            end = data.rfind(b"\n") + 1
        file.truncate(end)
        os.fsync(file.fileno())
    return last


class _Sink(Protocol):
    def write(self, record: Record) -> None: ...
    def close(self) -> None: ...


class _TensorBoard:
    """Scalars in TensorBoard's event format, through its own record writer, so without importing torch."""

    def __init__(self, directory: Path, resume_step: int | None) -> None:
        # Imported here because it takes a third of a second, which a run without TensorBoard need not pay.
        from tensorboard.compat.proto import event_pb2, summary_pb2  # type: ignore[import-untyped]
        from tensorboard.summary.writer.record_writer import RecordWriter  # type: ignore[import-untyped]

        self._event, self._summary, self._session_log = event_pb2.Event, summary_pb2.Summary, event_pb2.SessionLog
        directory.mkdir(parents=True, exist_ok=True)
        now = time.time()
        # The readers sort event files by name, so a later attempt's must sort after an earlier one's.
        name = f"events.out.tfevents.{now:017.6f}.{os.getpid()}"
        self._file = (directory / name).open("wb")
        self._records = RecordWriter(self._file)
        self._write(self._event(wall_time=now, file_version="brain.Event:2"))
        if resume_step is not None:
            # Tells TensorBoard to forget what an earlier attempt logged from this step on.
            start = self._session_log(status=self._session_log.START)
            self._write(self._event(wall_time=now, step=resume_step, session_log=start))

    def write(self, record: Record) -> None:
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


class _WeightsAndBiases:
    def __init__(self, run_directory: Path, settings: Mapping[str, Any]) -> None:
        try:
            import wandb  # type: ignore[import-not-found, unused-ignore]
        except ImportError as error:
            raise UserError("W&B logging is on but wandb is missing: pip install wandb, or turn it off") from error
        # The id outlives the process, so that a resumed run continues its own page.
        id_file = run_directory / "wandb_run_id"
        if not id_file.is_file():
            id_file.write_text(uuid.uuid4().hex[:16])
        self._run = wandb.init(**{"dir": str(run_directory), "id": id_file.read_text(), "resume": "allow", **settings})

    def write(self, record: Record) -> None:
        self._run.log({name: value for name, value in record.items() if name != "step"}, step=record["step"])

    def close(self) -> None:
        self._run.finish()
