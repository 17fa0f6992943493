"""Plots of one run or of several groups of runs, as PNG, PDF or SVG files.

A group of runs that differ only in their seed is drawn as the mean of its runs, with a band from the lowest to the
highest.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_rlvr.telemetry.metrics import Record
from megatron_rlvr.telemetry.panels import Panel, curves, panels, phases
from megatron_rlvr.telemetry.runs import RunGroup, load_run

# The palette of Okabe and Ito: distinguishable with any colour vision, and in greyscale.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#555555")
STYLES = ("-", "--", ":", "-.")
PHASE_COLOURS = {"upper relaxed": "#DCEBF7", "lower relaxed": "#FBE6D6", "both relaxed": "#E4E4E4"}


def plot_run(run_directory: str | os.PathLike[str], title: str, output: Path | None = None) -> list[Path]:
    """Plot a run: ``overview.png`` and one PNG per panel.

    Args:
        run_directory: directory of the run.
        title: title of the overview.
        output: folder for the files, by default ``plots/`` in the run directory.

    Returns:
        the files written.

    Raises:
        UserError: when the directory holds no metrics.
    """
    records, evaluations = load_run(run_directory)
    group = RunGroup(title, [records], [evaluations])
    return plot_groups([group], title, output or Path(run_directory) / "plots")


def plot_groups(
    groups: Sequence[RunGroup], title: str, output: Path, file_type: str = "png", smooth: int = 1
) -> list[Path]:
    """Plot groups of runs together: an overview and one file per panel in `output`; returns the files written.

    `file_type` is png, pdf or svg. With `smooth` above 1, a curve is the mean over this many latest steps; evaluations
    are not smoothed.

    Panels for which no run has values are left out. A single group also shows the phases of its schedule as the
    background of the entropy. Several groups are distinguished by colour.
    """
    from matplotlib.figure import Figure  # here, because the import takes over a second

    output.mkdir(parents=True, exist_ok=True)
    nonempty = [panel for panel in panels(groups) if any(curves(group, panel) for group in groups)]
    columns = min(3, max(len(nonempty), 1))
    rows = -(-len(nonempty) // columns)
    overview = Figure(figsize=(5.2 * columns, 3.3 * rows + 0.8), dpi=110, layout="constrained")
    overview.suptitle(title, fontsize=14, fontweight="bold")
    written = [output / f"overview.{file_type}"]
    for position, panel in enumerate(nonempty):
        _draw(overview.add_subplot(rows, columns, position + 1), groups, panel, smooth)
        single = Figure(figsize=(6.4, 4.2), dpi=120, layout="constrained")
        _draw(single.add_subplot(), groups, panel, smooth)
        written.append(output / f"{panel.name}.{file_type}")
        _save(single, groups, written[-1])
    _save(overview, groups, written[0])
    return written


def moving_mean(values: Sequence[float], steps: int) -> list[float]:
    """Return the mean of each value and the `steps` - 1 before it; at the start, of as many as there are."""
    windows = (values[max(0, end - steps) : end] for end in range(1, len(values) + 1))
    return [math.fsum(window) / len(window) for window in windows]


def _save(figure: Any, groups: Sequence[RunGroup], path: Path) -> None:
    """Save a figure. With several groups, a legend of their colours goes below all panels."""
    from matplotlib.lines import Line2D

    if len(groups) > 1:
        keys = [Line2D([], [], color=COLOURS[i % len(COLOURS)], linewidth=2.5) for i in range(len(groups))]
        labels = [g.label if len(g.runs) == 1 else f"{g.label} (mean and range of {len(g.runs)} runs)" for g in groups]
        figure.legend(keys, labels, loc="outside lower center", ncols=min(len(groups), 3), frameon=False)
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.08)
    figure.savefig(path)


def _draw(axes: Any, groups: Sequence[RunGroup], panel: Panel, smooth: int) -> None:
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    if panel.reference is not None:
        axes.axhline(panel.reference, color="#888888", linewidth=0.8, zorder=1)
    if panel.name == "entropy" and len(groups) == 1:
        _shade_phases(axes, groups[0].runs[0])
    for index, group in enumerate(groups):
        for curve in curves(group, panel):
            colour = COLOURS[(curve.series.colour if len(groups) == 1 else index) % len(COLOURS)]
            style = STYLES[curve.series.style % len(STYLES)]
            marker = "o" if panel.from_evaluations or len(curve.steps) == 1 else None
            mean, low, high = curve.mean, curve.low, curve.high
            if not panel.from_evaluations:
                mean, low, high = (moving_mean(values, smooth) for values in (mean, low, high))
            axes.plot(curve.steps, mean, style, color=colour, marker=marker, markersize=4, zorder=3)
            if low != high:
                axes.fill_between(curve.steps, low, high, color=colour, alpha=0.18, linewidth=0, zorder=2)
    axes.set_title(panel.title, loc="left", fontsize=11)
    axes.set_xlabel("step")
    axes.set_ylabel(panel.unit)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
    axes.margins(x=0.02)
    axes.grid(axis="y", color="#E0E0E0", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if panel.percent:
        axes.yaxis.set_major_formatter(PercentFormatter(xmax=1.0))
    if panel.from_zero:
        axes.set_ylim(bottom=0.0)
    _add_legend(axes, groups, panel)


def _add_legend(axes: Any, groups: Sequence[RunGroup], panel: Panel) -> None:
    """Add the legend of a panel: its curves or, with several groups, the meaning of the line styles."""
    from matplotlib.lines import Line2D

    handles, labels = axes.get_legend_handles_labels()
    drawn = [s for s in panel.series if any(curve.series is s for group in groups for curve in curves(group, panel))]
    if len(drawn) > 1 or handles:
        for series in drawn:
            colour = COLOURS[series.colour] if len(groups) == 1 else "#333333"
            if series.label not in labels:
                handles.append(Line2D([], [], color=colour, linestyle=STYLES[series.style]))
                labels.append(series.label)
        axes.legend(handles, labels, fontsize=8, framealpha=0.8, edgecolor="none", handlelength=2.6)


def _shade_phases(axes: Any, records: Sequence[Record]) -> None:
    labelled: set[str] = set()
    for first_step, last_step, phase in phases(records):
        if phase in PHASE_COLOURS:
            label = None if phase in labelled else phase
            labelled.add(phase)
            axes.axvspan(
                first_step - 0.5, last_step + 0.5, color=PHASE_COLOURS[phase], linewidth=0, zorder=0, label=label
            )
