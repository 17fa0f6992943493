"""Everything that a run reports: metrics files, the progress display, its status, plots and the final summary."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from megatron_rlvr.config import Config
from megatron_rlvr.errors import UserError
from megatron_rlvr.telemetry.metrics import MetricsWriter, read_metrics
from megatron_rlvr.telemetry.mlflow_sink import MLflow
from megatron_rlvr.telemetry.plots import plot_run
from megatron_rlvr.telemetry.progress import Progress, open_progress
from megatron_rlvr.telemetry.samples import Row, remove_samples, three_of, write_samples, write_worst_tokens
from megatron_rlvr.telemetry.sinks import WeightsAndBiases
from megatron_rlvr.telemetry.status import StatusWriter
from megatron_rlvr.telemetry.summary import print_summary
from megatron_rlvr.telemetry.time_left import PeriodicWork
from megatron_rlvr.telemetry.timer import StepTimer


class Reporter:
    """Reports a run. Every process times its steps and keeps the newest metrics; only the active process writes.

    Args:
        config: the configuration of the run.
        first_step: 0 for a new run, otherwise the step that a checkpoint resumes from. Metrics of this step and later
            ones, written before the run was interrupted, are removed, and so are their samples.
        active: whether this process writes.

    Attributes:
        newest: the newest value of every metric; those of evaluations are named ``evaluation/*``.
    """

    def __init__(self, config: Config, first_step: int, active: bool):
        self.config = config
        self.directory = Path(config.run_directory)
        self.newest: dict[str, float] = {}
        self._timer = StepTimer()
        self._writer: MetricsWriter | None = None
        self._progress: Progress | None = None
        self._status: StatusWriter | None = None
        self._prompt: Any = None
        if not active:
            return
        settings = config.telemetry
        # A run that was killed before its first checkpoint starts again at step 0 in its own directory.
        self._writer = MetricsWriter(self.directory, first_step, tensorboard=settings.tensorboard)
        remove_samples(self.directory, first_step)
        if settings.wandb_project:
            wandb = WeightsAndBiases(self.directory, {"project": settings.wandb_project, "name": config.name})
            self._writer.sinks.append(wandb)
        if settings.mlflow_experiment:
            self._writer.sinks.append(MLflow(self.directory, settings.mlflow_experiment, config.name))
        history = read_metrics(self.directory) if first_step else []
        work = PeriodicWork(config.data.heldout is not None, config.evaluation.every, config.checkpoint.every)
        self._progress = open_progress(config.name, config.steps, history, work=work)
        self._status = StatusWriter(self.directory, config.name, config.steps, first_step, history, work)

    def phase(self, name: str) -> None:
        """Show what the run is doing now."""
        if self._progress and self._status:
            self._progress.phase(name)
            self._status.phase(name)

    @contextmanager
    def timed_phase(self, name: str, part: str) -> Iterator[None]:
        """Show what the run is doing now, and add the seconds that the block takes to ``time/<part>`` of the step."""
        self.phase(name)
        with self._timer.part(part):
            yield

    def add_seconds(self, **parts: float) -> None:
        """Add seconds that were measured elsewhere to ``time/<part>`` of the step."""
        for part, seconds in parts.items():
            self._timer.add(part, seconds)

    def step(self, metrics: Mapping[str, float]) -> None:
        """Write the metrics of a finished step, with its times. The next step begins here."""
        self.newest.update(metrics)
        record = {**metrics, **self._timer.metrics()}
        if self._writer and self._progress and self._status:
            self._writer.write(record)
            self._progress.update(record)
            self._status.step(record)

    def evaluation(self, step: int, scores: Mapping[str, float]) -> None:
        """Write an evaluation of the policy after `step` steps."""
        self.newest.update({f"evaluation/{name}": value for name, value in scores.items()})
        if self._writer:
            self._writer.write_evaluation({"step": step, **scores})

    def samples(self, step: int, rows: Sequence[Row], *, heldout: bool = False) -> None:
        """Store the samples of a step, or of the evaluation after `step` steps, and show three of a step."""
        if self._writer and self._progress and rows:
            write_samples(self.directory, step, rows, heldout=heldout)
            self._prompt = rows[0]["prompt"]
            if not heldout:
                self._progress.samples(three_of(rows))

    def worst_tokens(self, step: int, rows: Sequence[Row]) -> None:
        """Store the tokens of a step whose log-probs differ most between engine and trainer."""
        if self._writer and rows:
            write_worst_tokens(self.directory, step, rows)

    def saved(self, step: int) -> None:
        """Show that the checkpoint of `step` steps is complete."""
        if self._status:
            self._status.saved(step)

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
        if self.config.lora.rank:
            results["adapters (PEFT)"] = self.directory / "adapter"
        if self.config.checkpoint.export_huggingface:
            folder = self.directory / "huggingface"
            results["policy (Hugging Face)"] = folder
            results |= self._command_to_sample(folder)
        print_summary(self.directory, results)

    def _command_to_sample(self, folder: Path) -> dict[str, str]:
        """The command that samples from the exported policy, if the last prompt can stand on a command line."""
        program, prompt = Path("examples/quickstart/sample.py"), self._prompt
        if not program.is_file() or not isinstance(prompt, str) or len(prompt) > 200 or not prompt.isprintable():
            return {}
        command = (_relative_to_here(Path(sys.executable)), program, folder, prompt)
        length = f" --max-tokens {self.config.rollout.max_tokens}"
        return {"sample from it": " ".join(shlex.quote(str(word)) for word in command) + length}

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


def _relative_to_here(path: Path) -> Path:
    """A path as the user would type it in the current directory."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
