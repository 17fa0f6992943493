"""The table at the end of a run: what it gained, and what it cost in entropy."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_rlvr.telemetry.metrics import EVALUATIONS_FILE, Record, read_metrics

# Training rewards are of one batch of prompts each; a few steps together tell where the run began and ended.
STEPS_AVERAGED = 5


def summary_table(records: Sequence[Record], evaluations: Sequence[Record]) -> Table:
    """Held-out results before and after, the course of the training reward and entropy, and the clip fractions.

    Before and after are the first and the last evaluation; a run with one evaluation shows it as "after" only.
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
        ends = min(STEPS_AVERAGED, max(len(rewards) // 2, 1))
        start, end = (math.fsum(part) / len(part) for part in (rewards[:ends], rewards[-ends:]))
        label = "training reward" if ends == 1 else f"training reward, mean of {ends} steps"
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
            mean, most = math.fsum(fractions) / len(fractions), max(fractions)
            table.add_row(f"tokens {label}", f"mean {mean:.2%}", f"most {most:.2%}", "")
    return table


def print_summary(
    run_directory: str | os.PathLike[str], results: Mapping[str, str | os.PathLike[str]], console: Console | None = None
) -> None:
    """Print the table of a finished run and under it, a line each, where its results lie and the commands to go on."""
    console = console or Console()
    directory = Path(run_directory)
    evaluations = directory / EVALUATIONS_FILE
    records = read_metrics(directory)
    console.print(summary_table(records, read_metrics(evaluations) if evaluations.is_file() else []))
    width = max((len(label) for label in results), default=0)
    for label, value in results.items():
        # soft_wrap, so that a path or command can be copied whole.
        console.print(f"{label:{width}}  {os.fspath(value)}", soft_wrap=True, highlight=False, markup=False)


def _column(records: Sequence[Record], name: str) -> list[float]:
    return [record[name] for record in records if math.isfinite(record.get(name, math.nan))]


def _before_after(before: float | None, after: float) -> tuple[str, str, str]:
    if before is None:
        return "-", f"{after:.3f}", "-"
    return f"{before:.3f}", f"{after:.3f}", f"{after - before:+.3f}"
