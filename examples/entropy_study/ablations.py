"""The report's sections beside the strategies: thresholds alone, other settings, the phase split, and long runs."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Sequence

from measurements import BOUNDS, PASSES, RATES, REWARDS, Measurement
from results import Difference, Run, Runs, difference, percents, spread, tracking_errors

from megatron_rlvr.control import EntropyCurve


def authority_section(measurements: Sequence[Measurement], folder: str) -> list[str]:
    """What thresholds do to one rollout's entropy, by rewards, learning rate and passes, less static clipping."""
    if not measurements:
        return []
    states = {(m.seed, m.step) for m in measurements}
    others = [bound for bound in BOUNDS if bound != "static"]
    lines = [
        "## What thresholds alone can do to a step",
        "",
        "From the same state (weights and Adam's moments of a GRPO run) and on the same rollout, training under "
        "constant thresholds: *upper* and *lower* are the paper's dynamic ones, *steep* an upper one of slope −2.8 and "
        "intercept 3.0. Static: ln of entropy after over before, of the same tokens. Then the others' less static's, "
        f"paired, mean ± standard error over {len(states)} states of {len({s for s, _ in states})} runs, in percent of "
        "entropy a rollout; bold as above. *Coin*: the same rollouts with rewards drawn by a coin, so that there is "
        "nothing to learn. The last column: rollouts until the difference of *upper* adds up to a tenth of the "
        "entropy, if it adds up.",
        "",
        "| rewards | learning rate | passes | static, % | "
        + " | ".join(f"{b} less static, %" for b in others)
        + " | clipped high, low | rollouts to 10 % |",
        "| --- | --- | --- | --- |" + " --- |" * (len(others) + 2),
    ]
    for rewards, rate, passes in itertools.product(REWARDS, RATES, PASSES):
        of_bound = {
            bound: {
                (m.seed, m.step): m
                for m in measurements
                if (m.rewards, m.rate, m.passes, m.bound) == (rewards, rate, passes, bound)
            }
            for bound in BOUNDS
        }
        static = of_bound["static"]
        if not static:
            continue
        apart = {
            bound: Difference.of(
                [100 * (m.shift - static[state].shift) for state, m in of_bound[bound].items() if state in static]
            )
            for bound in others
        }
        upper = apart["upper"]
        rollouts = f"{10 / upper.mean:.0f}" if upper.sign > 0 else ""
        clipped = ", ".join(
            f"{100 * statistics.mean(getattr(m, name) for m in static.values()):.1f} %"
            for name in ("clipped_high", "clipped_low")
        )
        lines.append(
            f"| {rewards} | {rate:g} | {passes} | {spread((100 * m.shift for m in static.values()), 1)} | "
            + " | ".join(apart[bound].text(2) for bound in others)
            + f" | {clipped} | {rollouts} |"
        )
    return [*lines, "", f"![authority]({folder}/authority.png)"]


def regime_section(runs: Runs, regimes: dict[str, dict[str, str]]) -> list[str]:
    """Whole runs where more updates a rollout, or rewards without a signal, give thresholds more to do."""
    lines = [
        "## Where thresholds separate",
        "",
        "Whole runs of other settings. Entropy kept, with the difference to static clipping of the same seed; final "
        "pass@1; tokens clipped high and low.",
        "",
        "| setting | strategy | seeds | entropy kept | less static | final pass@1 | clipped high | clipped low |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    rows = 0
    for setting, strategies in regimes.items():
        for label, name in strategies.items():
            if not runs.get(name):
                continue
            rows += 1
            of = list(runs[name].values())
            static = strategies["static"]
            apart = "" if name == static else difference(runs, name, static, lambda run: run.entropy_kept)
            lines.append(
                f"| {setting} | {label} | {len(of)} | {spread(r.entropy_kept for r in of)} | {apart} | "
                f"{spread(r.pass_at(1, len(r.steps)) for r in of)} | "
                f"{spread(r.mean('clip/fraction_high') for r in of)} | "
                f"{spread(r.mean('clip/fraction_low') for r in of)} |"
            )
    return lines if rows else []


def splits_section(runs: Runs, splits: dict[str, str], total: int) -> list[str]:
    present = {label: name for label, name in splits.items() if runs.get(name)}
    if len(present) < 2:
        return []
    measures: dict[str, Callable[[Run], float]] = {
        "entropy kept": lambda run: run.entropy_kept,
        "mid pass@64": lambda run: run.pass_at(64, total // 2),
        "final pass@1": lambda run: run.pass_at(1, total),
        "final pass@64": lambda run: run.pass_at(64, total),
    }
    lines = [
        "## Where increase-then-decrease is split",
        "",
        "Mean ± standard deviation, and the difference to the split at 0.5 over the seeds that both have.",
        "",
        "| split | seeds | " + " | ".join(f"{m} | less 0.5" for m in measures) + " |",
        "| --- | --- |" + " --- | --- |" * len(measures),
    ]
    for label, name in present.items():
        cells = []
        for value in measures.values():
            apart = "" if label == "0.5" else str(difference(runs, name, splits["0.5"], value))
            cells.append(f"{spread(value(run) for run in runs[name].values())} | {apart}")
        lines.append(f"| {label} | {len(runs[name])} | " + " | ".join(cells) + " |")
    return lines


def long_section(runs: Runs, names: Sequence[str], curves: dict[str, EntropyCurve], folder: str) -> list[str]:
    """The long runs; ``names`` has the static one first."""
    static, present = names[0], [name for name in names if runs.get(name)]
    if static not in present:
        return []
    total = len(next(iter(runs[static].values())).steps)
    measures: dict[str, Callable[[Run], float]] = {
        "entropy kept": lambda run: run.entropy_kept,
        "mid pass@64": lambda run: run.pass_at(64, total // 2),
        "final pass@1": lambda run: run.pass_at(1, total),
        "final pass@16": lambda run: run.pass_at(16, total),
        "final pass@64": lambda run: run.pass_at(64, total),
    }
    lines = [
        "## Longer runs",
        "",
        f"{total} steps, everything else as above. Mean ± standard deviation, and the difference to the static clip "
        "of the same seeds.",
        "",
        "| strategy | seeds | " + " | ".join(f"{m} | less static" for m in measures) + " |",
        "| --- | --- |" + " --- | --- |" * len(measures),
    ]
    for name in present:
        cells = []
        for value in measures.values():
            apart = "" if name == static else str(difference(runs, name, static, value))
            cells.append(f"{spread(value(run) for run in runs[name].values())} | {apart}")
        lines.append(f"| {name} | {len(runs[name])} | " + " | ".join(cells) + " |")
    for name in present:
        if name in curves:
            errors = tracking_errors(runs[name], curves[name])
            mean = 100 * statistics.mean(errors)
            lines += [
                "",
                f"{name} is off its curve by {mean:.1f} % root mean square (each seed {percents(errors)}).",
            ]
    return [*lines, "", f"![long runs]({folder}/long.png)"]
