"""The picture and the table of runs on the real model, of one seed or of several."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.table import Table

from megatron_rlvr.telemetry.metrics import Record
from megatron_rlvr.telemetry.plots import COLOURS

STATIC, DRAWN = NAMES = ("static-clipping", "drawn-curve")
LABELS = {STATIC: "static clipping", DRAWN: "target entropy"}
STYLES = {STATIC: COLOURS[6], DRAWN: COLOURS[0]}
ROWS = ("pass@1", "pass@8", "pass@16", "distinct_solutions")


def draw(runs: Mapping[str, Sequence[Sequence[Record]]], path: Path) -> None:
    """Save a figure of entropy and reward over the steps: the mean over seeds, and their range as a band.

    Args:
        runs: the metrics of the runs of each seed, by a name of `NAMES`.
        path: the file to write; its suffix decides the format.
    """
    from matplotlib.figure import Figure  # here, because the import takes over a second
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    figure = Figure(figsize=(9.2, 3.7), dpi=110, layout="constrained")
    entropy, reward = figure.subplots(1, 2, width_ratios=(3, 2))
    # The curve starts at the measured entropy of each run, so with several seeds it is the mean of their curves.
    curves = [[record["control/target"] for record in run] for run in runs.get(DRAWN, ()) if "control/target" in run[0]]
    if curves:
        mean = [statistics.mean(column) for column in zip(*curves, strict=True)]
        entropy.plot(mean, color=COLOURS[1], linestyle="--", linewidth=1.8, label="drawn curve", zorder=3)
    for name in (DRAWN, STATIC):
        for axes, metric in ((entropy, "entropy"), (reward, "reward")):
            columns = list(zip(*([record[metric] for record in run] for run in runs[name]), strict=True))
            axes.plot(list(map(statistics.mean, columns)), color=STYLES[name], linewidth=1.8, label=LABELS[name])
            if len(runs[name]) > 1:
                low, high = list(map(min, columns)), list(map(max, columns))
                axes.fill_between(range(len(columns)), low, high, color=STYLES[name], alpha=0.18, linewidth=0)
    entropy.set_title("Entropy of the policy, nats per token")
    reward.set_title("Reward: share of right answers")
    reward.yaxis.set_major_formatter(PercentFormatter(1.0))
    entropy.set_ylim(bottom=0.0)
    reward.set_ylim(0.0, 1.02)
    for axes in (entropy, reward):
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    entropy.legend(frameon=False, loc="lower left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})


def results_table(evaluations: Sequence[Sequence[Record]]) -> Table:
    """Return the held-out results before training and after both runs.

    Args:
        evaluations: the evaluation records of the runs of `NAMES`, the first of each before training.
    """
    table = Table(title="Held-out prompts", title_justify="left", title_style="bold")
    table.add_column("")
    for name in ("before", *LABELS.values()):
        table.add_column(name, justify="right")
    columns = [evaluations[0][0], *(records[-1] for records in evaluations)]
    for row in ROWS:
        values = (f"{column[row]:.3f}" if row in column else "-" for column in columns)
        table.add_row(row.replace("_", " "), *values)
    return table
