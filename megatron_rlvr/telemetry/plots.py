"""Plots of one run, or of several side by side: the course of a run at a glance.

A curve is drawn for a group of runs that differ in their seed only: their mean, and a band from the lowest to the
highest run. One run is a group of one, without a band.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_rlvr.control import AffineThreshold, ClipThresholds
from megatron_rlvr.telemetry.metrics import EVALUATIONS_FILE, Record, read_metrics

# Okabe and Ito's colours: told apart by readers with any colour vision, and in grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#555555")
STYLES = ("-", "--", ":", "-.")
PHASE_COLOURS = {"upper relaxed": "#DCEBF7", "lower relaxed": "#FBE6D6", "both relaxed": "#E4E4E4"}


@dataclass
class RunGroup:
    """Runs that differ in their seed only; runs and evaluations hold one list of records a run."""

    label: str
    runs: list[list[Record]]
    evaluations: list[list[Record]] = field(default_factory=list)


@dataclass(frozen=True)
class Series:
    """One curve of a panel: its label, its value in a record (None where the record has none), and its looks.

    One group of runs uses colour and line style; several groups have a colour each, and keep the line style.
    """

    label: str
    value: Callable[[Record], float | None]
    colour: int = 0
    style: int = 0


@dataclass(frozen=True)
class Panel:
    """One set of axes: a file name, a title, the unit of the vertical axis, and the curves."""

    name: str
    title: str
    unit: str
    series: tuple[Series, ...]
    from_evaluations: bool = False
    percent: bool = False
    # A horizontal line that gives the curves their meaning: ratio 1, change 0.
    reference: float | None = None
    from_zero: bool = False


def load_run(run_directory: str | os.PathLike[str]) -> tuple[list[Record], list[Record]]:
    """The metrics and evaluation records of a run directory; raises UserError when it holds no metrics."""
    evaluations = Path(run_directory) / EVALUATIONS_FILE
    return read_metrics(run_directory), read_metrics(evaluations) if evaluations.is_file() else []


def plot_run(run_directory: str | os.PathLike[str], title: str, output: Path | None = None) -> list[Path]:
    """Draw a run into PNG files, by default in its ``plots/``: ``overview.png`` and one file a panel; their paths."""
    records, evaluations = load_run(run_directory)
    group = RunGroup(title, [records], [evaluations])
    return plot_groups([group], title, output or Path(run_directory) / "plots")


def plot_groups(groups: Sequence[RunGroup], title: str, output: Path) -> list[Path]:
    """Draw groups of runs over each other: ``overview.png`` and one PNG a panel in output; the paths written.

    A panel that no run has values for is left out. One group is drawn with the phases of its schedule behind the
    entropy; several groups have a colour each.
    """
    from matplotlib.figure import Figure  # over a second to import: paid when plots are drawn

    output.mkdir(parents=True, exist_ok=True)
    panels = [panel for panel in _panels(groups) if any(_curves(group, panel) for group in groups)]
    columns = min(3, max(len(panels), 1))
    rows = -(-len(panels) // columns)
    overview = Figure(figsize=(5.2 * columns, 3.3 * rows + 0.8), dpi=110, layout="constrained")
    overview.suptitle(title, fontsize=14, fontweight="bold")
    written = [output / "overview.png"]
    for position, panel in enumerate(panels):
        _draw(overview.add_subplot(rows, columns, position + 1), groups, panel)
        single = Figure(figsize=(6.4, 4.2), dpi=120, layout="constrained")
        _draw(single.add_subplot(), groups, panel)
        _save(single, groups, output / f"{panel.name}.png")
        written.append(output / f"{panel.name}.png")
    _save(overview, groups, written[0])
    return written


def _save(figure: Any, groups: Sequence[RunGroup], path: Path) -> None:
    """Save a figure, with one legend of the groups below all its panels where there are several."""
    from matplotlib.lines import Line2D

    if len(groups) > 1:
        keys = [Line2D([], [], color=COLOURS[i % len(COLOURS)], linewidth=2.5) for i in range(len(groups))]
        labels = [g.label if len(g.runs) == 1 else f"{g.label} (mean and range of {len(g.runs)} runs)" for g in groups]
        figure.legend(keys, labels, loc="outside lower center", ncols=min(len(groups), 3), frameon=False)
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.08)
    figure.savefig(path)


def _metric(name: str, label: str = "", look: int = 0) -> Series:
    return Series(label, lambda record: record.get(name), look, look)


def _total(names: Sequence[str]) -> Series:
    return Series("", lambda record: sum(record[n] for n in names) if all(n in record for n in names) else None)


def _prediction(groups: Sequence[RunGroup]) -> Series:
    """The predicted entropy change at the size of the measured one: first-order theory leaves the step size open.

    One positive factor for all runs, so that their signs, courses and differences stay to be compared.
    """
    squares = {"predicted": 0.0, "measured": 0.0}
    for record in (record for group in groups for run in group.runs for record in run):
        both = [record.get(f"entropy_change/{name}", math.nan) for name in squares]
        if all(map(math.isfinite, both)):
            squares = {name: total + value**2 for (name, total), value in zip(squares.items(), both, strict=True)}
    factor = math.sqrt(squares["measured"] / squares["predicted"]) if all(squares.values()) else 1.0

    def value(record: Record) -> float | None:
        predicted = record.get("entropy_change/predicted")
        return None if predicted is None else factor * predicted

    return Series(f"predicted × {factor:.2g}", value)


def _ratio_bound(side: int, prob: float, label: str, colour: int) -> Series:
    def value(record: Record) -> float | None:
        names = ("clip/lower_intercept", "clip/lower_slope", "clip/upper_intercept", "clip/upper_slope")
        if any(name not in record for name in names):
            return None
        lower_intercept, lower_slope, upper_intercept, upper_slope = (record[name] for name in names)
        thresholds = ClipThresholds(
            AffineThreshold(lower_intercept, lower_slope), AffineThreshold(upper_intercept, upper_slope)
        )
        return thresholds.ratio_bounds(prob)[side]

    return Series(label, value, colour, int(prob))


def _panels(groups: Sequence[RunGroup]) -> list[Panel]:
    passes = {name for g in groups for run in g.evaluations for r in run for name in r if name.startswith("pass@")}
    shown = sorted(passes, key=lambda name: int(name.removeprefix("pass@")))
    # Four curves are legible: the smallest, the largest, and pass@8, which the summary names, between them.
    shown = [name for name in shown if name in (shown[0], "pass@8", shown[-1])]
    if len(groups) == 1:
        title = "Entropy regions of tokens"
        curves: tuple[Series, ...] = (
            _metric("region/E1", "E1: likely, A > 0 (lowers)", 0),
            _metric("region/E2", "E2: unlikely, A > 0 (raises)", 1),
            _metric("region/E3", "E3: likely, A < 0 (raises)", 2),
            _metric("region/E4", "E4: unlikely, A < 0 (lowers)", 3),
        )
    else:
        title = "Tokens that raise entropy (E2 and E3)"
        curves = (_total(("region/E2", "region/E3")),)
    # Upper and lower bounds lie on either side of 1: among several groups the line style tells p alone.
    upper, lower = ("upper, ", "lower, ") if len(groups) == 1 else ("", "")
    regions = Panel("regions", title, "of tokens", curves, percent=True, from_zero=True)
    return [
        Panel(
            "entropy",
            "Entropy of the policy",
            "nats per token",
            (
                _metric("entropy", "measured"),
                _metric("control/target", "target", 1),
                _metric("control/band_low", "switches up below", 2),
                _metric("control/band_high", "switches down above", 3),
            ),
        ),
        Panel("reward", "Training reward", "mean a completion", (_metric("reward"),)),
        Panel(
            "heldout",
            "Held-out prompts",
            "fraction solved",
            tuple(_metric(name, name, look) for look, name in enumerate(shown)),
            from_evaluations=True,
        ),
        Panel(
            "thresholds",
            "Clip bounds of the importance ratio",
            "ratio",
            (
                _ratio_bound(1, 0.0, upper + "p = 0", 0),
                _ratio_bound(1, 1.0, upper + "p = 1", 0),
                _ratio_bound(0, 0.0, lower + "p = 0", 1),
                _ratio_bound(0, 1.0, lower + "p = 1", 1),
            ),
            reference=1.0,
        ),
        Panel(
            "clip_fractions",
            "Clipped tokens",
            "of tokens",
            (
                _metric("clip/fraction_high", "at the upper bound"),
                _metric("clip/fraction_low", "at the lower bound", 1),
            ),
            percent=True,
            from_zero=True,
        ),
        regions,
        Panel(
            "entropy_change",
            "Entropy change of a step",
            "nats per token",
            (_prediction(groups), _metric("entropy_change/measured", "measured", 1)),
            reference=0.0,
        ),
        Panel("grad_norm", "Gradient norm", "before clipping", (_metric("grad_norm"),), from_zero=True),
        Panel(
            "kl_rollout",
            "Rollout against training policy",
            "KL, nats per token",
            (_metric("kl_rollout"),),
            reference=0.0,
        ),
    ]


@dataclass(frozen=True)
class _Curve:
    """A series of a group: at each step the mean over runs, and the lowest and highest run."""

    series: Series
    steps: list[int]
    mean: list[float]
    low: list[float]
    high: list[float]


def _curves(group: RunGroup, panel: Panel) -> list[_Curve]:
    curves = []
    for series in panel.series:
        at_step: dict[int, list[float]] = {}
        for run in group.evaluations if panel.from_evaluations else group.runs:
            for record in run:
                value = series.value(record)
                if value is not None and math.isfinite(value):
                    at_step.setdefault(record["step"], []).append(value)
        # A mean over fewer runs than the others would jump where a run ends: keep the steps that most runs have.
        most = max((len(values) for values in at_step.values()), default=0)
        steps = sorted(step for step, values in at_step.items() if len(values) == most)
        if steps:
            values = [at_step[step] for step in steps]
            mean = [math.fsum(v) / len(v) for v in values]
            curves.append(_Curve(series, steps, mean, [min(v) for v in values], [max(v) for v in values]))
    return curves


def _draw(axes: Any, groups: Sequence[RunGroup], panel: Panel) -> None:
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    if panel.reference is not None:
        axes.axhline(panel.reference, color="#888888", linewidth=0.8, zorder=1)
    if panel.name == "entropy" and len(groups) == 1:
        _shade_phases(axes, groups[0].runs[0])
    for index, group in enumerate(groups):
        for curve in _curves(group, panel):
            colour = COLOURS[(curve.series.colour if len(groups) == 1 else index) % len(COLOURS)]
            style = STYLES[curve.series.style % len(STYLES)]
            marker = "o" if panel.from_evaluations or len(curve.steps) == 1 else None
            axes.plot(curve.steps, curve.mean, style, color=colour, marker=marker, markersize=4, zorder=3)
            if curve.low != curve.high:
                axes.fill_between(curve.steps, curve.low, curve.high, color=colour, alpha=0.18, linewidth=0, zorder=2)
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
    _legend(axes, groups, panel)


def _legend(axes: Any, groups: Sequence[RunGroup], panel: Panel) -> None:
    """What the curves of a panel are; with several groups, whose colours stand below the figure, their line styles."""
    from matplotlib.lines import Line2D

    handles, labels = axes.get_legend_handles_labels()
    drawn = [s for s in panel.series if any(curve.series is s for group in groups for curve in _curves(group, panel))]
    if len(drawn) > 1 or handles:
        for series in drawn:
            colour = COLOURS[series.colour] if len(groups) == 1 else "#333333"
            if series.label not in labels:
                handles.append(Line2D([], [], color=colour, linestyle=STYLES[series.style]))
                labels.append(series.label)
        axes.legend(handles, labels, fontsize=8, framealpha=0.8, edgecolor="none", handlelength=2.6)


def _shade_phases(axes: Any, records: Sequence[Record]) -> None:
    spans = list(_phases(records))
    for start, end, phase in spans:
        if phase in PHASE_COLOURS:
            first = all(phase != earlier for _, _, earlier in spans[: spans.index((start, end, phase))])
            axes.axvspan(
                start - 0.5,
                end + 0.5,
                color=PHASE_COLOURS[phase],
                linewidth=0,
                zorder=0,
                label=phase if first else None,
            )


def _phases(records: Iterable[Record]) -> Iterable[tuple[int, int, str]]:
    """The stretches of steps over which the same thresholds depend on a token's probability: (first, last, phase)."""
    spans: list[tuple[int, int, str]] = []
    for record in records:
        upper, lower = record.get("clip/upper_slope"), record.get("clip/lower_slope")
        if upper is None or lower is None:
            continue
        names = {(True, False): "upper relaxed", (False, True): "lower relaxed", (True, True): "both relaxed"}
        phase = names.get((upper != 0, lower != 0), "static")
        if spans and spans[-1][2] == phase:
            spans[-1] = (spans[-1][0], record["step"], phase)
        else:
            spans.append((record["step"], record["step"], phase))
    return spans
