"""The report's sections on runs of other settings: constant thresholds, the phase split, and long runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from results import Run, Runs, difference, spread


def authority_section(runs: Runs, authority: dict[str, dict[str, str]], folder: str) -> list[str]:
    lines = [
        "## What thresholds alone can do",
        "",
        "Constant thresholds, no steering; a setting is passes over the rollout (8 updates each) × learning rate. "
        "*Upper* and *lower* are the paper's dynamic thresholds, *steep* an upper one of slope −2.8 and intercept "
        "3.0. Entropy kept, with the difference to static clipping of the same seed; final pass@1; tokens clipped "
        "high and low.",
        "",
        "| setting | bound | seeds | entropy kept | less static | final pass@1 | clipped high | clipped low |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    rows = 0
    for setting, bounds in authority.items():
        for bound, name in bounds.items():
            if not runs.get(name):
                continue
            rows += 1
            of = list(runs[name].values())
            apart = "" if bound == "static" else difference(runs, name, bounds["static"], lambda run: run.entropy_kept)
            lines.append(
                f"| {setting} | {bound} | {len(of)} | {spread(r.entropy_kept for r in of)} | {apart} | "
                f"{spread(r.pass_at(1, len(r.steps)) for r in of)} | "
                f"{spread(r.mean('clip/fraction_high') for r in of)} | "
                f"{spread(r.mean('clip/fraction_low') for r in of)} |"
            )
    return [*lines, "", f"![authority]({folder}/authority.png)"] if rows else []


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


def long_section(runs: Runs, names: Sequence[str], folder: str) -> list[str]:
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
    return [*lines, "", f"![long runs]({folder}/long.png)"]
