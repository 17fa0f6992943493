"""What `compare.py` shows at its end: the picture of both entropies and the table of both results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table
from rich.text import Text

from megatron_rlvr.telemetry.metrics import Record
from megatron_rlvr.telemetry.plots import COLOURS

# The controller needs some steps to learn how entropy responds, so the first tenth of a run is not judged.
SETTLING_SHARE = 0.1


def draw(static: Sequence[Record], controlled: Sequence[Record], label: str, path: Path) -> None:
    """Save a figure of the entropy of both runs over their steps, with the drawn curve if the second run has one.

    Args:
        static, controlled: the metrics records of the two runs.
        label: what the second run is.
        path: the file to write; its suffix decides the format.
    """
    from matplotlib.figure import Figure  # here, because the import takes over a second

    figure = Figure(figsize=(7.2, 4.2), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    target = [(record["step"], record["control/target"]) for record in controlled if "control/target" in record]
    if target:
        axes.plot(*zip(*target, strict=True), color=COLOURS[1], linestyle="--", linewidth=1.6, label="drawn curve")
    followed = "measured entropy" if target else label
    for records, name, colour in ((controlled, followed, COLOURS[0]), (static, "static clipping", COLOURS[6])):
        steps, entropy = [r["step"] for r in records], [r["entropy"] for r in records]
        axes.plot(steps, entropy, color=colour, linewidth=1.6, label=name)
    axes.set_title("Entropy of the policy")
    axes.set_xlabel("step")
    axes.set_ylabel("nats per token")
    axes.set_ylim(bottom=0.0)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.savefig(path)


def largest_error(records: Sequence[Record], total_steps: int) -> float | None:
    """The largest |entropy / drawn curve - 1| of a step after the first tenth; None if the run has no curve."""
    errors = [
        abs(record["entropy"] / record["control/target"] - 1.0)
        for record in records
        if "control/target" in record and record["step"] >= SETTLING_SHARE * total_steps
    ]
    return max(errors, default=None)


def results_table(names: Sequence[str], evaluations: Sequence[Sequence[Record]]) -> Table:
    """Held-out pass@k before training and after each of the runs.

    Args:
        names: a name per run.
        evaluations: the evaluation records of each run, the first of them before training.
    """
    table = Table(title="Held-out prompts", title_justify="left", title_style="bold")
    table.add_column("")
    for name in ("before", *names):
        table.add_column(name, justify="right")
    for row in ("pass@1", "pass@8", "pass@16"):
        values = [evaluations[0][0], *(records[-1] for records in evaluations)]
        table.add_row(Text(row), *(f"{value[row]:.3f}" if row in value else "-" for value in values))
    return table
