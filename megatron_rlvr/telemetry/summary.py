"""The table at the end of a run: held-out results, reward and entropy before and after."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_rlvr.telemetry.metrics import EVALUATIONS_FILE, Record, read_metrics

# The reward of a single step is noisy, because every step has other prompts. The first and last steps are averaged.
STEPS_AVERAGED = 5


def summary_table(records: Sequence[Record], evaluations: Sequence[Record]) -> Table:
    """Held-out results, training reward and entropy before and after, and the clip fractions.

    "Before" and "after" are the first and the last evaluation. A single evaluation is shown as "after".
    """
    table = Table(title="Summary of the run", title_justify="left", title_style="bold")
    table.add_column("")
    for head in ("before", "after", "change"):
        table.add_column(head, justify="right")
    first = evaluations[0] if len(evaluations) > 1 else {}
    last = evaluations[-1] if evaluations else {}
    for name in ("reward", *sorted((n for n in last if n.startswith("pass@")), key=lambda n: int(n[5:]))):
        if name in last:
            table.add_row(f"held-out {name}", *_before_after(first.get(name), last[name]))
    rewards = _column(records, "reward")
    if rewards:
        count = min(STEPS_AVERAGED, max(len(rewards) // 2, 1))
        start, end = (math.fsum(values) / count for values in (rewards[:count], rewards[-count:]))
        label = "training reward" if count == 1 else f"training reward, mean of {count} steps"
        table.add_row(label, *_before_after(start, end))
    entropies = _column(records, "entropy")
    if entropies:
        peak = max(entropies)
        at = next(record["step"] for record in records if record.get("entropy") == peak)
        table.add_row("entropy (nats per token)", *_before_after(entropies[0], entropies[-1]))
        table.add_row("", f"peak {peak:.3f}", f"at step {at}", "", end_section=True)
    for side, label in (("high", "clipped at the upper bound"), ("low", "clipped at the lower bound")):
        fractions = _column(records, f"clip/fraction_{side}")
        if fractions:
            mean, highest = math.fsum(fractions) / len(fractions), max(fractions)
            table.add_row(f"tokens {label}", f"mean {mean:.2%}", f"most {highest:.2%}", "")
    return table


def print_summary(
    run_directory: str | os.PathLike[str], results: Mapping[str, str | os.PathLike[str]], console: Console | None = None
) -> None:
    """Print the table of a finished run and below it `results`: paths and commands, one line per label."""
    console = console or Console()
    directory = Path(run_directory)
    evaluations = directory / EVALUATIONS_FILE
    records = read_metrics(directory)
    console.print(summary_table(records, read_metrics(evaluations) if evaluations.is_file() else []))
    width = max((len(label) for label in results), default=0)
    for label, value in results.items():
        # soft_wrap keeps a path or command on one line, so that it can be copied.
        console.print(f"{label:{width}}  {os.fspath(value)}", soft_wrap=True, highlight=False, markup=False)


def _column(records: Sequence[Record], name: str) -> list[float]:
    return [record[name] for record in records if math.isfinite(record.get(name, math.nan))]


def _before_after(before: float | None, after: float) -> tuple[str, str, str]:
    if before is None:
        return "-", f"{after:.3f}", "-"
    return f"{before:.3f}", f"{after:.3f}", f"{after - before:+.3f}"
