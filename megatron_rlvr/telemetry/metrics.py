"""The metrics of a run: ``metrics.jsonl`` and ``evaluations.jsonl``, written, read, and cut back when a run resumes.

A record is a flat dict of numbers by metric name, with the step under "step"; docs/metrics.md lists the names. Both
files hold one JSON object per line. A run that was killed and resumed leaves the same files as an uninterrupted one.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_rlvr.checked_input import InvalidInputError, checked, field, parse_object
from megatron_rlvr.errors import UserError
from megatron_rlvr.telemetry.sinks import Sink, TensorBoard

METRICS_FILE = "metrics.jsonl"
EVALUATIONS_FILE = "evaluations.jsonl"
LARGEST_STEP = 2**53

Record = dict[str, Any]


def is_wall_clock(name: str) -> bool:
    """Whether a metric depends on the machine's speed or memory and may therefore differ between identical runs."""
    return name.startswith(("time/", "memory/")) or name.endswith("per_second")


def deterministic(record: Mapping[str, Any]) -> Record:
    """A record without its wall-clock metrics: identical runs on the CPU agree in the rest bit for bit."""
    return {name: value for name, value in record.items() if not is_wall_clock(name)}


def read_metrics(path: str | os.PathLike[str]) -> list[Record]:
    """Read the records of a metrics or evaluations file, or of the ``metrics.jsonl`` of a run directory.

    An incomplete last line, left by a kill, is skipped. null, which stands for a number that was not finite, reads as
    nan.

    Raises:
        UserError: when there is no such file, or a complete line is not a record.
    """
    file = Path(path)
    if file.is_dir():
        file = file / METRICS_FILE
    if not file.is_file():
        raise UserError(f"no metrics at {file}: give a run directory that holds {METRICS_FILE}, or such a file")
    return [record for record, _ in _records(file)]


class MetricsWriter:
    """Writes the records of a run to the JSON files and to its sinks. One process of a run owns one writer.

    On resume, records of `resume_step` and later steps are removed; create the writer only after the checkpoint to
    resume from has been chosen. The evaluation of step s is of the policy after s steps, which is the policy in the
    checkpoint of step s. It is therefore kept when the run resumes at s, and an evaluation written again replaces it.
    Evaluate at the beginning of a step, or at its end before the checkpoint: a kill between a checkpoint and an
    evaluation that follows it would lose the evaluation.

    Args:
        run_directory: created if it does not exist.
        resume_step: first step of this process, None for a new run.
        tensorboard: also write TensorBoard event files.

    Attributes:
        sinks: what else receives every record.

    Raises:
        UserError: if a new run finds the metrics of another.
    """

    def __init__(
        self,
        run_directory: str | os.PathLike[str],
        resume_step: int | None = None,
        *,
        tensorboard: bool = True,
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
            self._last_step = _truncate(self.metrics_path, resume_step)
            _truncate(self.evaluations_path, resume_step + 1)
            if resume_step > 0 and self._last_step != resume_step - 1:
                extent = "is empty" if self._last_step is None else f"ends at step {self._last_step}"
                warnings.warn(
                    f"{self.metrics_path} {extent}, but the run resumes at step {resume_step}; the records between are "
                    "missing",
                    stacklevel=2,
                )
        self.sinks: list[Sink] = [TensorBoard(directory / "tensorboard", resume_step)] if tensorboard else []
        if tensorboard and resume_step is not None and self.evaluations_path.is_file():
            # TensorBoard drops what was logged from this step on, but this evaluation is kept and not repeated.
            for kept, _ in _records(self.evaluations_path):
                if kept["step"] == resume_step:
                    self.sinks[0].write(_evaluation_names(kept))

    def write(self, record: Mapping[str, Any]) -> None:
        """Append the record of a step, on disk when this returns. Tensors and NumPy scalars become plain numbers.

        Raises:
            ValueError: when the record has no integer step, or its step is not greater than the last one.
        """
        plain = _plain(record)
        if self._last_step is not None and plain["step"] <= self._last_step:
            raise ValueError(f"metrics: step {plain['step']} must be greater than the last one, {self._last_step}")
        _append(self.metrics_path, plain)
        self._last_step = plain["step"]
        for sink in self.sinks:
            sink.write(plain)

    def write_evaluation(self, record: Mapping[str, Any]) -> None:
        """Append the evaluation of the policy after record["step"] steps, replacing one of this step or later ones."""
        plain = _plain(record)
        _truncate(self.evaluations_path, plain["step"])
        _append(self.evaluations_path, plain)
        for sink in self.sinks:
            sink.write(_evaluation_names(plain))

    def close(self) -> None:
        for sink in self.sinks:
            sink.close()
        self.sinks.clear()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _evaluation_names(record: Mapping[str, Any]) -> Record:
    """An evaluation as sinks receive it, beside the metrics of training."""
    return {name if name == "step" else f"evaluation/{name}": value for name, value in record.items()}


def _plain(record: Mapping[str, Any]) -> Record:
    """The record with plain Python values. Raises ValueError when it has no integer step."""
    plain = {name: value.item() if hasattr(value, "item") else value for name, value in record.items()}
    step = plain.get("step")
    if not isinstance(step, int) or isinstance(step, bool):
        raise ValueError(f"a record needs an integer 'step', found {step!r}")
    return plain


def _append(path: Path, record: Record) -> None:
    # JSON has no nan and no infinity. Python would write them anyway, and other JSON readers would reject the file.
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    line = json.dumps(finite, allow_nan=False) + "\n"
    with path.open("ab") as file:
        file.write(line.encode())
        file.flush()
        os.fsync(file.fileno())


def _records(path: Path) -> Iterator[tuple[Record, int]]:
    """The records of a file, each with the byte offset of its line. A last line without a newline is skipped."""
    offset = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                record = parse_object(line)
                field(record, "step", int, at_least=0, at_most=LARGEST_STEP)
                for name, value in record.items():
                    if value is not None:
                        checked(value, float, name)
            except InvalidInputError as error:
                raise UserError(
                    f"{path} line {number} is not a record of numbers ({error}): correct or remove that line"
                ) from error
            yield {name: math.nan if value is None else value for name, value in record.items()}, offset
            offset += len(line)


def _truncate(path: Path, first_step: int) -> int | None:
    """Remove an incomplete last line and the records from first_step on; returns the last step kept, or None."""
    if not path.is_file():
        return None
    last_step, end = None, 0
    with path.open("r+b") as file:
        for record, offset in _records(path):
            if record["step"] >= first_step:
                end = offset
                break
            last_step = record["step"]
        else:
            # Whatever follows the last newline is a line that a kill interrupted.
            data = file.read()
            end = data.rfind(b"\n") + 1
        file.truncate(end)
        os.fsync(file.fileno())
    return last_step
