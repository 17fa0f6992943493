"""Further sections of the report: thresholds alone, other settings, and long runs."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from answers import listed, section
from measurements import REWARDS, Measurement, by_setting
from results import Difference, Run, Runs, above_courses, count, difference, percents, spread, tracking_errors

from megatron_rlvr.control import EntropyCurve

STUDY_RATE, STUDY_PASSES = 1e-4, 2
"""The setting of the study's runs among those of the measurements."""


def authority_section(measurements: Sequence[Measurement], folder: str) -> list[str]:
    """What thresholds do to the entropy of one rollout, compared with static clipping."""
    if not measurements:
        return []
    states = {(m.seed, m.step) for m in measurements}

    settings = by_setting(measurements)
    of_rewards = {rewards: settings[rewards, STUDY_RATE, STUDY_PASSES] for rewards in REWARDS}
    changes = {rewards: 100 * statistics.mean(c.static.shift for c in each) for rewards, each in of_rewards.items()}
    added = {rewards: statistics.mean(c.added("steep") for c in each) for rewards, each in of_rewards.items()}
    answer = (
        f"At the study's learning rate and {STUDY_PASSES} passes, the steepest threshold adds {added['task']:+.1f} % "
        f"of entropy per rollout where static clipping changes it by {changes['task']:+.1f} %; with random rewards the "
        f"two are {added['coin']:+.1f} % and {changes['coin']:+.1f} %."
    )
    lines = [
        "One rollout from one saved state (weights and Adam's moments of a GRPO run) is trained on once with each of "
        "four constant thresholds: static, the default dynamic *upper* and *lower* thresholds, and *steep*, an upper "
        f"threshold with slope −2.8 and intercept 3.0. The figure shows means over {len(states)} states of "
        f"{count(len({seed for seed, _ in states}), 'run')}; `python examples/entropy_study/authority.py` measures "
        "them, and [all numbers](#entropy-change-of-one-rollout-under-each-threshold) are in the appendix.",
    ]
    figure = [f"![Entropy change under each threshold minus static clipping, by passes]({folder}/authority.png)"]
    question = "How far do thresholds alone move entropy in a step?"
    return section("What thresholds alone can do to a step", question, answer, figure, lines)


def regime_section(runs: Runs, regimes: dict[str, dict[str, str]]) -> list[str]:
    """Complete runs in settings in which thresholds act on more tokens."""
    lines = [
        "Complete runs with 4 passes (32 updates per rollout), with the task's rewards and with random ones (coin).",
        "",
        "| setting | strategy | seeds | entropy kept | minus static | final pass@1 | clipped high | clipped low |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    rows, separate = 0, []
    for setting, strategies in regimes.items():
        for label, name in strategies.items():
            if not runs.get(name):
                continue
            rows += 1
            of_seed = list(runs[name].values())
            static, change = strategies["static"], ""
            if name != static:
                entropy = difference(runs, name, static, lambda run: run.entropy_kept)
                change = str(entropy)
                separate += [f"{label} ({setting}: {entropy.mean:+.2f})"] if entropy.sign else []
            lines.append(
                f"| {setting} | {label} | {len(of_seed)} | {spread(r.entropy_kept for r in of_seed)} | {change} | "
                f"{spread(r.pass_at(1, len(r.steps)) for r in of_seed)} | "
                f"{spread(r.mean('clip/fraction_high') for r in of_seed)} | "
                f"{spread(r.mean('clip/fraction_low') for r in of_seed)} |"
            )
    answer = f"The entropy kept differs from static clipping for {listed(separate)}."
    question = "With more updates per rollout, do thresholds separate from static clipping over a complete run?"
    return section("Where thresholds separate", question, answer, lines) if rows else []


def closed_loop_section(runs: Runs, settings: dict[str, dict[str, str]], curve: EntropyCurve) -> list[str]:
    """Thresholds alone in closed loop: is entropy higher halfway than at the start, as increase-then-decrease says?

    Args:
        runs: finished runs.
        settings: setting -> label -> strategy, of which ``closed-id`` follows ``curve``.
        curve: drawn over the progress of a run.
    """
    present = {s: names for s, names in settings.items() if all(runs.get(name) for name in names.values())}
    if not present:
        return []
    peak = curve.value(0.5, 1.0)
    lines = [
        "The schedule increase-then-decrease (id) relaxes a threshold and hopes that entropy follows. In closed loop, "
        f"the controller chooses which threshold to relax, and how far, so that entropy rises to {peak:g} of its start "
        f"halfway, and falls to {curve.value(1.0, 1.0):g} at the end. Halfway is the mean of three steps. The error is "
        "that of closed-id's curve.",
        "",
        "| setting | strategy | seeds | entropy halfway / start | entropy kept | error |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    rises, without = [], []
    for setting, names in present.items():
        halves = {label: [run.entropy_halfway for run in runs[name].values()] for label, name in names.items()}
        for label, name in names.items():
            error = f"{100 * statistics.mean(tracking_errors(runs[name], curve)):.1f} %"
            lines.append(
                f"| {setting} | {label} | {len(halves[label])} | {spread(halves[label])} | "
                f"{spread(run.entropy_kept for run in runs[name].values())} | {error} |"
            )
        if Difference.of([half - 1.0 for half in halves["closed-id"]]).sign > 0:
            closed, static = (statistics.mean(halves[label]) for label in ("closed-id", "static"))
            rises.append(f"{setting} (to {closed:.2f} of its start, under static clipping to {static:.2f})")
        else:
            without.append(setting)
    answer = f"Halfway, entropy has risen with {listed(rises)}; not with {listed(without)}."
    question = "Can thresholds alone raise entropy, if a controller chooses them?"
    return section("Thresholds in closed loop", question, answer, lines)


def long_section(
    runs: Runs, names: Sequence[str], rivals: Sequence[str], curves: dict[str, EntropyCurve], folder: str
) -> list[str]:
    """The long runs; the first of ``names`` is the one with static clipping, and ``rivals`` are others' methods."""
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
        f"{total} steps, everything else as above. Differences are to static clipping (long-grpo).",
        "",
        "| strategy | seeds | " + " | ".join(f"{m} | minus static" for m in measures) + " |",
        "| --- | --- |" + " --- | --- |" * len(measures),
    ]
    diverse = []
    for name in present:
        cells = []
        for measure, value in measures.items():
            change = difference(runs, name, static, value)
            if measure == "final pass@16" and name != static and change.sign:
                diverse.append(f"{name} ({change.mean:+.3f})")
            cells.append(f"{spread(value(run) for run in runs[name].values())} | {'' if name == static else change}")
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
    others = [static, *(name for name in present if name.removeprefix("long-") in rivals)]
    ours = [name for name in present if name not in others]
    above = {name: {other: above_courses(runs, name, other, total) for other in others} for name in ours}
    lines += [
        "",
        "Height of the final pass@16 above the course of static clipping, and of each other method that ran, at the "
        "same pass@1:",
        "",
        f"| strategy | {' | '.join(others)} |",
        "| --- |" + " --- |" * len(others),
        *(f"| {name} | {' | '.join(map(str, heights.values()))} |" for name, heights in above.items()),
    ]
    judged = [other for other in others if len(runs[other]) > 1]
    best = [name for name, heights in above.items() if all(heights[other].sign > 0 for other in judged)]
    answer = (
        f"After {total} steps, pass@16 differs from that of static clipping for {listed(diverse)}. Above the course "
        f"of {listed(judged)}: {listed(best)}."
    )
    if single := [other for other in others if other not in judged]:
        answer += f" One seed is too few to judge {listed(single)}."
    question = "What is left of it in long runs?"
    figure = [f"![Entropy, reward and gradient norm of the long runs]({folder}/long.png)"]
    return section("Longer runs", question, answer, figure, lines)
