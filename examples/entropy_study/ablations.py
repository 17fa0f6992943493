"""Further sections of the report: thresholds alone, other settings, the phase split, and long runs."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Sequence

from measurements import BOUNDS, PASSES, RATES, REWARDS, Measurement
from results import Difference, Run, Runs, count, difference, percents, spread, tracking_errors

from megatron_rlvr.control import EntropyCurve


def authority_section(measurements: Sequence[Measurement], folder: str) -> list[str]:
    """What thresholds do to the entropy of one rollout, compared with static clipping."""
    if not measurements:
        return []
    states = {(m.seed, m.step) for m in measurements}
    others = [bound for bound in BOUNDS if bound != "static"]
    lines = [
        "## What thresholds alone can do to a step",
        "",
        "Each row trains on one rollout from one saved state (weights and Adam's moments of a GRPO run), once with "
        "each of four constant thresholds: static, the default dynamic *upper* and *lower* thresholds, and *steep*, an "
        "upper threshold with slope −2.8 and intercept 3.0. `python examples/entropy_study/authority.py` measures it.",
        "",
        "- *static* is the change of ln entropy on the same tokens, in percent per rollout.",
        f"- *minus static* is the paired difference, mean ± standard error over {len(states)} states of "
        f"{count(len({seed for seed, _ in states}), 'run')}; bold as above.",
        "- *coin* rows use the same rollouts with random rewards, so there is nothing to learn.",
        "- *rollouts to 10 %* is the number of rollouts after which the difference of *upper* would add up to a tenth "
        "of the entropy. It is empty where the difference is not resolved or negative.",
        "",
        "| rewards | learning rate | passes | static, % | "
        + " | ".join(f"{b} minus static, %" for b in others)
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
        differences = {
            bound: Difference.of(
                [100 * (m.shift - static[state].shift) for state, m in of_bound[bound].items() if state in static]
            )
            for bound in others
        }
        upper = differences["upper"]
        rollouts = f"{10 / upper.mean:.0f}" if upper.sign > 0 else ""
        clipped = ", ".join(
            f"{100 * statistics.mean(getattr(m, name) for m in static.values()):.1f} %"
            for name in ("clipped_high", "clipped_low")
        )
        lines.append(
            f"| {rewards} | {rate:g} | {passes} | {spread((100 * m.shift for m in static.values()), 1)} | "
            + " | ".join(differences[bound].text(2) for bound in others)
            + f" | {clipped} | {rollouts} |"
        )
    return [
        *lines,
        "",
        f"![Entropy change under each threshold minus static clipping, by passes]({folder}/authority.png)",
    ]


def regime_section(runs: Runs, regimes: dict[str, dict[str, str]]) -> list[str]:
    """Complete runs in settings in which thresholds act on more tokens."""
    lines = [
        "## Where thresholds separate",
        "",
        "Complete runs with 4 passes (32 updates per rollout), with the task's rewards and with random ones (coin).",
        "",
        "| setting | strategy | seeds | entropy kept | minus static | final pass@1 | clipped high | clipped low |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    rows = 0
    for setting, strategies in regimes.items():
        for label, name in strategies.items():
            if not runs.get(name):
                continue
            rows += 1
            of_seed = list(runs[name].values())
            static = strategies["static"]
            change = "" if name == static else difference(runs, name, static, lambda run: run.entropy_kept)
            lines.append(
                f"| {setting} | {label} | {len(of_seed)} | {spread(r.entropy_kept for r in of_seed)} | {change} | "
                f"{spread(r.pass_at(1, len(r.steps)) for r in of_seed)} | "
                f"{spread(r.mean('clip/fraction_high') for r in of_seed)} | "
                f"{spread(r.mean('clip/fraction_low') for r in of_seed)} |"
            )
    return lines if rows else []


def splits_section(runs: Runs, splits: dict[str, str], total: int) -> list[str]:
    """The ablation of where increase-then-decrease begins its second phase; ``splits`` maps labels to strategies."""
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
        "*Split* is the share of the run at which the second phase begins. Differences are to the split at 0.5.",
        "",
        "| split | seeds | " + " | ".join(f"{m} | minus 0.5" for m in measures) + " |",
        "| --- | --- |" + " --- | --- |" * len(measures),
    ]
    for label, name in present.items():
        cells = []
        for value in measures.values():
            change = "" if label == "0.5" else str(difference(runs, name, splits["0.5"], value))
            cells.append(f"{spread(value(run) for run in runs[name].values())} | {change}")
        lines.append(f"| {label} | {len(runs[name])} | " + " | ".join(cells) + " |")
    return lines


def long_section(runs: Runs, names: Sequence[str], curves: dict[str, EntropyCurve], folder: str) -> list[str]:
    """The long runs; the first of ``names`` is the one with static clipping."""
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
        f"{total} steps, everything else as above. Differences are to static clipping (long-grpo).",
        "",
        "| strategy | seeds | " + " | ".join(f"{m} | minus static" for m in measures) + " |",
        "| --- | --- |" + " --- | --- |" * len(measures),
    ]
    for name in present:
        cells = []
        for value in measures.values():
            change = "" if name == static else str(difference(runs, name, static, value))
            cells.append(f"{spread(value(run) for run in runs[name].values())} | {change}")
        lines.append(f"| {name} | {len(runs[name])} | " + " | ".join(cells) + " |")
    for name in present:
        if name in curves:
            errors = tracking_errors(runs[name], curves[name])
            mean = 100 * statistics.mean(errors)
            lines += [
                "",
                f"{name} follows its curve with a root mean square error of {mean:.1f} % "
                f"(each seed: {percents(errors)}).",
            ]
    return [*lines, "", f"![Entropy, reward and gradient norm of the long runs]({folder}/long.png)"]
