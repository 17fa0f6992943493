"""What the plots of a run show: the panels, their curves, and the phases of the schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from megatron_rlvr.control import AffineThreshold, ClipThresholds
from megatron_rlvr.telemetry.metrics import Record
from megatron_rlvr.telemetry.runs import RunGroup

NOISE = 1e-12
"""Differences of this size, relative to 1 or to larger values, are rounding noise, and drawn as a constant."""


@dataclass(frozen=True)
class Series:
    """One curve of a panel: its label, its value in a record (None if the record has none), its colour and line style.

    With several groups of runs, each group has a colour of its own and `colour` is ignored. `error` is the metric with
    the standard error of the value; the curve of a single run has a band of it.
    """

    label: str
    value: Callable[[Record], float | None]
    colour: int = 0
    style: int = 0
    error: str | None = None


@dataclass(frozen=True)
class Panel:
    """One set of axes.

    Attributes:
        name: stem of the PNG file.
        unit: label of the vertical axis.
        from_evaluations: whether the values come from evaluation records instead of metrics.
        percent: whether the axis is labelled in percent.
        reference: value of a horizontal line to compare with, such as ratio 1 or change 0.
        from_zero: whether the axis starts at zero.
    """

    name: str
    title: str
    unit: str
    series: tuple[Series, ...]
    from_evaluations: bool = False
    percent: bool = False
    reference: float | None = None
    from_zero: bool = False


@dataclass(frozen=True)
class Curve:
    """A series of a group: at each step the mean over the runs, and the lowest and the highest run.

    For a single run, the lowest and the highest are one standard error away if the series has one.
    """

    series: Series
    steps: list[int]
    mean: list[float]
    low: list[float]
    high: list[float]


def panels(groups: Sequence[RunGroup]) -> list[Panel]:
    """All panels for these groups, including those for which no run has values."""
    pass_names = {name for g in groups for run in g.evaluations for r in run for name in r if name.startswith("pass@")}
    ordered = sorted(pass_names, key=lambda name: int(name.removeprefix("pass@")))
    # More curves are not legible: draw the smallest k, the largest, and the k = 8 of the summary.
    drawn = [name for name in ordered if name in (ordered[0], "pass@8", ordered[-1])]
    if len(groups) == 1:
        region_title = "Entropy regions of tokens"
        region_series: tuple[Series, ...] = (
            _metric("region/E1", "E1: likely, A > 0 (lowers)", 0),
            _metric("region/E2", "E2: unlikely, A > 0 (raises)", 1),
            _metric("region/E3", "E3: likely, A < 0 (raises)", 2),
            _metric("region/E4", "E4: unlikely, A < 0 (lowers)", 3),
        )
    else:
        region_title = "Tokens that raise entropy (E2 and E3)"
        region_series = (_sum(("region/E2", "region/E3")),)
    # Upper and lower bounds lie on opposite sides of 1, so with several groups the line style alone can denote p.
    upper, lower = ("upper, ", "lower, ") if len(groups) == 1 else ("", "")
    return [
        Panel(
            "entropy",
            "Entropy of the policy",
            "nats per token",
            (
                replace(_metric("entropy", "measured"), error="entropy_standard_error"),
                _metric("control/target", "target", 1),
                _metric("control/band_low", "switches up below", 2),
                _metric("control/band_high", "switches down above", 3),
            ),
        ),
        Panel("reward", "Training reward", "mean per completion", (_metric("reward"),)),
        Panel(
            "heldout",
            "Held-out prompts",
            "fraction solved",
            tuple(_metric(name, name, number) for number, name in enumerate(drawn)),
            from_evaluations=True,
        ),
        Panel(
            "thresholds",
            "Clip bounds of the ratio: p = 0 improbable, p = 1 certain tokens",
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
        Panel("regions", region_title, "of tokens", region_series, percent=True, from_zero=True),
        Panel(
            "entropy_change",
            "Entropy change of a step",
            "nats per token",
            (_scaled_prediction(groups), _metric("entropy_change/measured", "measured", 1)),
            reference=0.0,
        ),
        Panel("length", "Response length", "tokens, mean", (_metric("response_length"),), from_zero=True),
        Panel(
            "truncated",
            "Responses cut at the maximum length",
            "of responses",
            (_metric("truncated_fraction"),),
            percent=True,
            from_zero=True,
        ),
        Panel("grad_norm", "Gradient norm", "before clipping", (_metric("grad_norm"),), from_zero=True),
        Panel(
            "kl_rollout",
            "Rollout against training policy",
            "KL, nats per token",
            (_metric("kl_rollout"),),
            reference=0.0,
        ),
        Panel(
            "kl_reference",
            "Policy against reference",
            "KL, nats per token",
            (_metric("kl_reference"),),
            from_zero=True,
        ),
    ]


def curves(group: RunGroup, panel: Panel) -> list[Curve]:
    """The curves of a group in a panel. Series without finite values are left out; rounding noise is removed."""
    result = []
    for series in panel.series:
        values_by_step: dict[int, list[float]] = {}
        errors: dict[int, float] = {}
        for run in group.evaluations if panel.from_evaluations else group.runs:
            for record in run:
                value = series.value(record)
                if value is not None and math.isfinite(value):
                    values_by_step.setdefault(record["step"], []).append(value)
                    error = record.get(series.error) if series.error else None
                    errors[record["step"]] = error if error is not None and math.isfinite(error) else 0.0
        # The mean would jump at a step where only some of the runs have a value, so such steps are left out.
        run_count = max((len(values) for values in values_by_step.values()), default=0)
        steps = sorted(step for step, values in values_by_step.items() if len(values) == run_count)
        if steps:
            values = [values_by_step[step] for step in steps]
            mean = [math.fsum(v) / len(v) for v in values]
            low, high = [min(v) for v in values], [max(v) for v in values]
            if max(high) - min(low) <= NOISE * max(1.0, abs(max(high)), abs(min(low))):
                constant = 0.0 if abs(mean[0]) <= NOISE else mean[0]
                mean = low = high = [constant] * len(steps)
            if run_count == 1:
                low = [value - errors[step] for step, value in zip(steps, low, strict=True)]
                high = [value + errors[step] for step, value in zip(steps, high, strict=True)]
            result.append(Curve(series, steps, mean, low, high))
    return result


def phases(records: Iterable[Record]) -> list[tuple[int, int, str]]:
    """Consecutive steps whose clip thresholds depend on the token's probability in the same way.

    Returns:
        (first step, last step, phase) with the phase "upper relaxed", "lower relaxed", "both relaxed" or "static".
    """
    names = {(True, False): "upper relaxed", (False, True): "lower relaxed", (True, True): "both relaxed"}
    spans: list[tuple[int, int, str]] = []
    for record in records:
        upper, lower = record.get("clip/upper_slope"), record.get("clip/lower_slope")
        if upper is None or lower is None:
            continue
        phase = names.get((upper != 0, lower != 0), "static")
        if spans and spans[-1][2] == phase:
            spans[-1] = (spans[-1][0], record["step"], phase)
        else:
            spans.append((record["step"], record["step"], phase))
    return spans


def _metric(name: str, label: str = "", number: int = 0) -> Series:
    """A metric as a series, with the colour and line style of this number."""
    return Series(label, lambda record: record.get(name), number, number)


def _sum(names: Sequence[str]) -> Series:
    return Series("", lambda record: sum(record[n] for n in names) if all(n in record for n in names) else None)


def _scaled_prediction(groups: Sequence[RunGroup]) -> Series:
    """The predicted entropy change, scaled to the root mean square of the measured one.

    First-order theory leaves the step size open. One positive factor for all runs keeps signs and relative sizes.
    """
    predicted_squares = measured_squares = 0.0
    for record in (record for group in groups for run in group.runs for record in run):
        predicted = record.get("entropy_change/predicted", math.nan)
        measured = record.get("entropy_change/measured", math.nan)
        if math.isfinite(predicted) and math.isfinite(measured):
            predicted_squares += predicted**2
            measured_squares += measured**2
    factor = math.sqrt(measured_squares / predicted_squares) if predicted_squares and measured_squares else 1.0

    def value(record: Record) -> float | None:
        predicted = record.get("entropy_change/predicted")
        return None if predicted is None else factor * predicted

    return Series(f"predicted × {factor:.2g}", value)


def _ratio_bound(side: int, prob: float, label: str, colour: int) -> Series:
    """The lower (side 0) or upper (side 1) bound of the importance ratio of a token with probability 0 or 1."""

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
