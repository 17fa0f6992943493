"""What a run shows while it works: a live panel on a terminal, one line a step anywhere else.

Both read the same metrics records that are written to disk, and show a dash for what a record lacks.
"""

from __future__ import annotations

import math
import time
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

BLOCKS = "▁▂▃▄▅▆▇█"
DASH = "-"
# Steps whose mean time predicts the time left: enough to smooth, few enough to follow responses that grow longer.
RECENT_STEPS = 10


class Progress(Protocol):
    """A display of a run: `phase` names what it is doing now, `update` takes the record of a finished step."""

    def phase(self, name: str) -> None: ...
    def update(self, record: Record) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def open_progress(
    title: str, total_steps: int, history: Sequence[Record] = (), console: Console | None = None
) -> Progress:
    """The live panel where the output is a terminal, plain lines otherwise (CI, Slurm logs, pipes).

    history holds the records of the steps before this process, so that a resumed run shows its whole course.
    """
    console = console or Console()
    if console.is_terminal and not console.is_dumb_terminal:
        return LiveProgress(title, total_steps, history, console)
    return PlainProgress(total_steps, history, console)


def sparkline(values: Sequence[float], width: int = 32) -> str:
    """The course of a number in one line of text, lowest to highest value; longer histories are averaged to width."""
    finite = [value for value in values if math.isfinite(value)]
    if len(finite) > width:
        edges = [round(i * len(finite) / width) for i in range(width + 1)]
        chunks = [finite[start:end] for start, end in pairwise(edges)]
        finite = [math.fsum(chunk) / len(chunk) for chunk in chunks]
    if not finite:
        return ""
    low, span = min(finite), max(finite) - min(finite)
    # A flat history is drawn in the middle; dividing by its rounding noise would show steps that are not there.
    if span <= 1e-9 * max(abs(low), 1e-9):
        return BLOCKS[3] * len(finite)
    return "".join(BLOCKS[min(int((value - low) / span * len(BLOCKS)), len(BLOCKS) - 1)] for value in finite)


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss, or m:ss under an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class _Course:
    """The records so far and the clock: what both displays know."""

    def __init__(self, total_steps: int, history: Sequence[Record]) -> None:
        self.total_steps = total_steps
        self.records = list(history)
        self.step_seconds: list[float] = []
        self.done = history[-1]["step"] + 1 if history else 0
        self._last = time.monotonic()

    def add(self, record: Record) -> None:
        now = time.monotonic()
        self.step_seconds.append(now - self._last)
        self._last = now
        self.records.append(record)
        self.done = record["step"] + 1

    def history(self, name: str) -> list[float]:
        return [record[name] for record in self.records if name in record]

    def left(self) -> str:
        recent = self.step_seconds[-RECENT_STEPS:]
        return duration(sum(recent) / len(recent) * (self.total_steps - self.done)) if recent else DASH

    def latest(self, name: str, form: str = ".3f", scale: float = 1.0) -> str:
        value = self.records[-1].get(name) if self.records else None
        return DASH if value is None else format(value * scale, form)

    def against_start(self, name: str) -> str:
        values = self.history(name)
        return f"{values[-1] / values[0]:.2f}" if values and values[0] > 0 else DASH

    def threshold(self, side: str, separator: str) -> str:
        """A threshold at p = 0 and at p = 1, as the affine function has them."""
        record = self.records[-1] if self.records else {}
        intercept, slope = record.get(f"clip/{side}_intercept"), record.get(f"clip/{side}_slope")
        if intercept is None or slope is None:
            return DASH
        return f"{intercept:.3f}{separator}{intercept + slope:.3f}"


class PlainProgress:
    """One line a step: step, reward, entropy, thresholds at p = 0..1, clipped high/low, length, seconds, time left."""

    def __init__(self, total_steps: int, history: Sequence[Record], console: Console) -> None:
        self._course = _Course(total_steps, history)
        self._console = console

    def phase(self, name: str) -> None:
        """Says nothing: a log keeps one line a step."""

    def update(self, record: Record) -> None:
        course = self._course
        course.add(record)
        width = len(str(course.total_steps))
        parts = [
            f"step {course.done:{width}d}/{course.total_steps}",
            f"reward {course.latest('reward')}",
            f"entropy {course.latest('entropy')} ({course.against_start('entropy')} of start)",
            f"upper {course.threshold('upper', '..')}",
            f"lower {course.threshold('lower', '..')}",
            f"clipped {_percent(course, 'clip/fraction_high')}/{_percent(course, 'clip/fraction_low')}",
            f"length {course.latest('response_length', '.1f')}",
            f"{course.step_seconds[-1]:.1f} s",
            f"left {course.left()}",
        ]
        # soft_wrap: a log line stays one line whatever width the console believes in.
        self._console.print("  ".join(parts), soft_wrap=True, highlight=False, markup=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass


class LiveProgress:
    """The panel, redrawn when a phase begins or a step ends, and at no other time: it takes no thread and no core."""

    def __init__(self, title: str, total_steps: int, history: Sequence[Record], console: Console) -> None:
        self._title = title
        self._course = _Course(total_steps, history)
        self._phase = "starting"
        self._live = Live(self._panel(), console=console, auto_refresh=False)

    def phase(self, name: str) -> None:
        self._phase = name
        self._live.update(self._panel(), refresh=True)

    def update(self, record: Record) -> None:
        self._course.add(record)
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
        course = self._course
        head = Table.grid(padding=(0, 2))
        seconds = f"{course.step_seconds[-1]:.1f} s a step" if course.step_seconds else ""
        head.add_row(
            Text(f"step {course.done}/{course.total_steps}", style="bold"),
            ProgressBar(total=course.total_steps, completed=course.done, width=24),
            Text(self._phase, style="cyan"),
            seconds,
            f"{course.left()} left",
        )
        body = Table.grid(padding=(0, 2))
        body.add_column(style="dim")
        body.add_column(justify="right", min_width=6)
        body.add_column(no_wrap=True)
        body.add_column(no_wrap=True, style="dim")
        for name, style in (("reward", "green"), ("entropy", "magenta")):
            history = Text(sparkline(course.history(name)), style=style)
            body.add_row(name, course.latest(name), history, f"{course.against_start(name)} × start")
        upper, lower = course.threshold("upper", " → "), course.threshold("lower", " → ")
        body.add_row("clip at", "", f"upper {upper}   lower {lower}", "for p = 0 → 1")
        high, low = _percent(course, "clip/fraction_high"), _percent(course, "clip/fraction_low")
        steering = course.latest("control/steering", "+.2f")
        body.add_row("clipped", "", f"high {high}   low {low}", "" if steering == DASH else f"steering {steering}")
        length, norm = course.latest("response_length", ".1f"), course.latest("grad_norm", ".3g")
        body.add_row("response", "", f"{length} tokens   gradient norm {norm}", "")
        return Panel(Group(head, "", body), title=self._title, title_align="left", expand=False, border_style="dim")


def _percent(course: _Course, name: str) -> str:
    return course.latest(name, ".1f", 100) + "%"
