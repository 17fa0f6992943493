"""The progress display of a run: a live panel on a terminal, one line per step anywhere else.

Both show the metrics records that are written to disk, with a dash for a value that a record does not have.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from megatron_rlvr.telemetry.metrics import Record
from megatron_rlvr.telemetry.samples import Row, one_line, prompt_text
from megatron_rlvr.telemetry.time_left import PeriodicWork, TimeLeft

BLOCKS = "▁▂▃▄▅▆▇█"
DASH = "-"


class Progress(Protocol):
    """A progress display.

    `phase` shows what the run is doing now, `update` the record of a finished step, `samples` a few of its samples.
    """

    def phase(self, name: str) -> None: ...
    def samples(self, rows: Sequence[Row]) -> None: ...
    def update(self, record: Record) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def open_progress(
    title: str,
    total_steps: int,
    history: Sequence[Record] = (),
    console: Console | None = None,
    work: PeriodicWork | None = None,
) -> Progress:
    """A live panel if the output is a terminal, plain lines otherwise (CI, Slurm logs, pipes).

    Args:
        title: title of the panel.
        total_steps: number of steps of the run.
        history: records of the steps before this process, so that a resumed run shows all its steps.
        console: standard output by default.
        work: when the run evaluates and saves.
    """
    console = console or Console()
    if console.is_terminal and not console.is_dumb_terminal:
        return LiveProgress(title, total_steps, history, console, work)
    return PlainProgress(total_steps, history, console, work)


def sparkline(values: Sequence[float], width: int = 32) -> str:
    """Draw values as a line of block characters, from the lowest to the highest value.

    More than `width` values are averaged to `width` characters. Values that are not finite are skipped.
    """
    finite = [value for value in values if math.isfinite(value)]
    if len(finite) > width:
        edges = [round(i * len(finite) / width) for i in range(width + 1)]
        chunks = [finite[start:end] for start, end in pairwise(edges)]
        finite = [math.fsum(chunk) / len(chunk) for chunk in chunks]
    if not finite:
        return ""
    low, span = min(finite), max(finite) - min(finite)
    # Constant values are drawn in the middle: dividing by their rounding noise would show changes that do not exist.
    if span <= 1e-9 * max(abs(low), 1e-9):
        return BLOCKS[3] * len(finite)
    return "".join(BLOCKS[min(int((value - low) / span * len(BLOCKS)), len(BLOCKS) - 1)] for value in finite)


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss, or m:ss under an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class _History:
    """The records and step times so far, formatted for display."""

    def __init__(self, total_steps: int, history: Sequence[Record], work: PeriodicWork | None) -> None:
        self.total_steps = total_steps
        self.records = list(history)
        self.finished_steps = history[-1]["step"] + 1 if history else 0
        self._time_left = TimeLeft(total_steps, work, history)

    def add(self, record: Record) -> None:
        self._time_left.step_ended(record)
        self.records.append(record)
        self.finished_steps = record["step"] + 1

    def values(self, name: str) -> list[float]:
        return [record[name] for record in self.records if name in record]

    def step_seconds(self) -> float | None:
        return self._time_left.last_step()

    def time_left(self, now: bool) -> str:
        """The time that the run still needs, or needed at the end of its last step."""
        seconds = self._time_left.now() if now else self._time_left.at_last_end()
        return DASH if seconds is None else duration(seconds)

    def latest(self, name: str, form: str = ".3f", scale: float = 1.0) -> str:
        value = self.records[-1].get(name) if self.records else None
        return DASH if value is None else format(value * scale, form)

    def ratio_to_start(self, name: str) -> str:
        values = self.values(name)
        return f"{values[-1] / values[0]:.2f}" if values and values[0] > 0 else DASH

    def threshold(self, side: str, separator: str) -> str:
        """The threshold at p = 0 and at p = 1."""
        record = self.records[-1] if self.records else {}
        intercept, slope = record.get(f"clip/{side}_intercept"), record.get(f"clip/{side}_slope")
        if intercept is None or slope is None:
            return DASH
        return f"{intercept:.3f}{separator}{intercept + slope:.3f}"


class PlainProgress:
    """Prints a line per step: reward, entropy, thresholds at p = 0..1, clipped high/low, length, seconds, time left."""

    def __init__(
        self, total_steps: int, history: Sequence[Record], console: Console, work: PeriodicWork | None = None
    ) -> None:
        self._history = _History(total_steps, history, work)
        self._console = console

    def phase(self, name: str) -> None:
        """Print nothing: a log has one line per step."""

    def samples(self, rows: Sequence[Row]) -> None:
        """Print nothing; ``tools/show_samples.py`` shows samples."""

    def update(self, record: Record) -> None:
        history = self._history
        history.add(record)
        width = len(str(history.total_steps))
        parts = [
            f"step {history.finished_steps:{width}d}/{history.total_steps}",
            f"reward {history.latest('reward')}",
            f"entropy {history.latest('entropy')} ({history.ratio_to_start('entropy')} of start)",
            f"upper {history.threshold('upper', '..')}",
            f"lower {history.threshold('lower', '..')}",
            f"clipped {_percent(history, 'clip/fraction_high')}/{_percent(history, 'clip/fraction_low')}",
            f"length {history.latest('response_length', '.1f')}",
            f"{history.step_seconds():.1f} s",
            f"left {history.time_left(now=False)}",
        ]
        # soft_wrap keeps a log line on one line, whatever width rich assumes.
        self._console.print("  ".join(parts), soft_wrap=True, highlight=False, markup=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass


class LiveProgress:
    """Shows a panel, redrawn only when a phase begins or a step ends, so that it needs no thread."""

    def __init__(
        self,
        title: str,
        total_steps: int,
        history: Sequence[Record],
        console: Console,
        work: PeriodicWork | None = None,
    ) -> None:
        self._title = title
        self._history = _History(total_steps, history, work)
        self._phase = "starting"
        self._samples: list[Row] = []
        self._live = Live(self._panel(), console=console, auto_refresh=False)

    def samples(self, rows: Sequence[Row]) -> None:
        """Show samples with the next phase or record."""
        self._samples = list(rows)

    def phase(self, name: str) -> None:
        self._phase = name
        self._live.update(self._panel(), refresh=True)

    def update(self, record: Record) -> None:
        self._history.add(record)
        self._live.update(self._panel(), refresh=True)

    def __enter__(self) -> Self:
        self._live.start(refresh=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._phase = "done" if kind is None else "stopped"
        self._live.update(self._panel(), refresh=True)
        self._live.stop()

    def _panel(self) -> Panel:
        history = self._history
        head = Table.grid(padding=(0, 2))
        step_seconds = history.step_seconds()
        head.add_row(
            Text(f"step {history.finished_steps}/{history.total_steps}", style="bold"),
            ProgressBar(total=history.total_steps, completed=history.finished_steps, width=24),
            Text(self._phase, style="cyan"),
            "" if step_seconds is None else f"{step_seconds:.1f} s per step",
            f"{history.time_left(now=True)} left",
        )
        body = Table.grid(padding=(0, 2))
        body.add_column(style="dim")
        body.add_column(justify="right", min_width=6)
        body.add_column(no_wrap=True)
        body.add_column(no_wrap=True, style="dim")
        for name, style in (("reward", "green"), ("entropy", "magenta")):
            line = Text(sparkline(history.values(name)), style=style)
            body.add_row(name, history.latest(name), line, f"{history.ratio_to_start(name)} × start")
        upper, lower = history.threshold("upper", " → "), history.threshold("lower", " → ")
        body.add_row("clip at", "", f"upper {upper}   lower {lower}", "for p = 0 → 1")
        high, low = _percent(history, "clip/fraction_high"), _percent(history, "clip/fraction_low")
        steering = history.latest("control/steering", "+.2f")
        body.add_row("clipped", "", f"high {high}   low {low}", "" if steering == DASH else f"steering {steering}")
        length, norm = history.latest("response_length", ".1f"), history.latest("grad_norm", ".3g")
        body.add_row("response", "", f"{length} tokens   gradient norm {norm}", "")
        samples = [""] if self._samples else []
        return Panel(
            Group(head, "", body, *samples, *map(_sample_line, self._samples)),
            title=self._title,
            title_align="left",
            expand=False,
            border_style="dim",
        )


def _sample_line(row: Row) -> Text:
    """A sample on one line: its reward, the end of its prompt, and the start of its completion."""
    prompt, completion = one_line(prompt_text(row["prompt"]), 10_000), one_line(row["completion"], 48)
    line = Text(f"{row['reward']:7.3f}  ", style="green")
    line.append(prompt if len(prompt) <= 32 else f"...{prompt[-29:]}", style="dim")
    return line.append(" \u2192 ", style="dim").append(completion, style="default")


def _percent(history: _History, name: str) -> str:
    return history.latest(name, ".1f", 100) + "%"
