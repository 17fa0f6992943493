"""One face for everything a run tells: metrics files, the progress display, plots and the table at the end."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from megatron_rlvr.config import Config
from megatron_rlvr.errors import UserError
from megatron_rlvr.telemetry.metrics import MetricsWriter, read_metrics
from megatron_rlvr.telemetry.plots import plot_run
from megatron_rlvr.telemetry.progress import Progress, open_progress
from megatron_rlvr.telemetry.status import StatusWriter
from megatron_rlvr.telemetry.summary import print_summary


def _shown(path: Path) -> Path:
    """A path as one would type it here."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


class Reporter:
    """Tells of a run on the process that is `active`; on the others every call does nothing.

    Args:
        config: of the run.
        first_step: 0 for a new run, else the step a checkpoint resumes from; later metrics lines are cut off.
        active: whether this process writes.
    """

    def __init__(self, config: Config, first_step: int, active: bool):
        self.config = config
        self.directory = Path(config.run_directory)
        self._writer: MetricsWriter | None = None
        self._progress: Progress | None = None
        self._status: StatusWriter | None = None
        if not active:
            return
        settings = config.telemetry
        wandb = {"project": settings.wandb_project, "name": config.name} if settings.wandb_project else None
        # A run killed before its first checkpoint starts over at step 0 in its own directory.
        self._writer = MetricsWriter(self.directory, first_step, tensorboard=settings.tensorboard, wandb=wandb)
        history = read_metrics(self.directory) if first_step else []
        self._progress = open_progress(config.name, config.steps, history)
        self._status = StatusWriter(self.directory, config.name, config.steps, first_step)

    def phase(self, name: str) -> None:
        """Say what the run is doing now."""
        if self._progress and self._status:
            self._progress.phase(name)
            self._status.phase(name)

    def step(self, record: Mapping[str, Any]) -> None:
        """Write the record of a finished step."""
        if self._writer and self._progress and self._status:
            self._writer.write(record)
            self._progress.update(dict(record))
            self._status.step(record)

    def saved(self, step: int) -> None:
        """Say that a checkpoint of `step` steps is whole."""
        if self._status:
            self._status.saved(step)

    def evaluation(self, record: Mapping[str, Any]) -> None:
        """Write an evaluation of the policy after ``record["step"]`` steps."""
        if self._writer:
            self._writer.write_evaluation(record)

    def message(self, text: str) -> None:
        """Print a line."""
        if self._writer:
            print(text, flush=True)

    def finish(self) -> None:
        """Draw the plots and print the summary."""
        if not self._writer or not self._progress:
            return
        self._close("done")
        results: dict[str, str | Path] = {"metrics": self.directory / "metrics.jsonl"}
        if self.config.telemetry.plots:
            results["plots"] = plot_run(self.directory, self.config.name)[0].parent
        if self.config.checkpoint.export_huggingface:
            folder = self.directory / "huggingface"
            results["policy (Hugging Face)"] = folder
            sampler = Path("examples/quickstart/sample.py")
            if sampler.is_file():
                results["sample from it"] = f"{_shown(Path(sys.executable))} {sampler} {folder} '3 5 7 : 22 >'"
        print_summary(self.directory, results)

    def __enter__(self) -> Self:
        if self._progress:
            self._progress.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._close("stopped")
        else:
            first_line = str(error).strip().partition("\n")[0]
            self._close(
                "failed", first_line if isinstance(error, UserError) else f"{type(error).__name__}: {first_line}"
            )

    def _close(self, state: str, reason: str | None = None) -> None:
        if self._status:
            self._status.ended(state, reason)
            self._status = None
        if self._progress:
            self._progress.__exit__(None, None, None)
            self._progress = None
        if self._writer:
            self._writer.close()
            self._writer = None
