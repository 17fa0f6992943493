"""The study's report: docs/entropy_study.md, its figures and its table of results, from the runs that have finished.

Every sentence that says whether something shows is decided by the numbers: a difference to GRPO, paired by seed, counts
where its 95 percent interval (Student's t) excludes 0.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import figures
from ablations import authority_section, long_section, regime_section, splits_section
from measurements import Measurement
from results import KS, Difference, Run, Runs, above_course, difference, percents, spread, tracking_errors, write_csv

from megatron_rlvr.control import EntropyCurve

THRESHOLDS = ("clip-higher", "upper-only", "lower-only", "id", "did", "od", "ce-gppo")


def write_report(
    runs: Runs,
    strategies: Sequence[str],
    curves: dict[str, EntropyCurve],
    splits: dict[str, str],
    regimes: dict[str, dict[str, str]],
    long: Sequence[str],
    measurements: Sequence[Measurement],
    total: int,
    document: Path,
) -> None:
    """Write ``document`` and, in the folder of its name, figures and ``results.csv``.

    Args:
        runs: finished runs.
        strategies: names, in the order of the tables.
        curves: of the strategies that follow one.
        splits: label -> strategy of the phase-split ablation.
        regimes: setting -> label -> strategy, the static one under the label ``static``.
        long: names of the long runs, the static one first.
        measurements: of what thresholds alone do to a step.
        total: steps of a run.
        document: the Markdown file.
    """
    folder = document.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    shown = [name for name in strategies if runs.get(name)]
    followed = {name: curve for name, curve in curves.items() if name in shown}
    if followed:
        figures.tracking(runs, followed, folder / "tracking.png")
    figures.courses(runs, shown, folder / "courses.png")
    figures.pass_at_k(runs, shown, (total // 2, total), folder / "pass_at_k.png")
    figures.frontier(runs, shown, total, folder / "frontier.png")
    if measurements:
        figures.authority(measurements, folder / "authority.png")
    if any(runs.get(name) for name in long):
        figures.courses(runs, long, folder / "long.png")
    write_csv(folder / "results.csv", runs, curves)
    parts = [
        _head(runs, shown, total),
        _tracking(runs, followed, folder.name) if followed else [],
        _strategies(runs, shown, folder.name),
        _held_out(runs, shown, total, folder.name),
        _claims(runs, total),
        _frontier(runs, shown, total, folder.name),
        authority_section(measurements, folder.name),
        regime_section(runs, regimes),
        splits_section(runs, splits, total),
        long_section(runs, long, curves, folder.name),
        _prediction(runs, shown),
        _missing(runs, [*strategies, *splits.values(), *(n for names in regimes.values() for n in names.values())]),
    ]
    document.write_text("\n\n".join("\n".join(part) for part in parts if part) + "\n")


def _head(runs: Runs, shown: Sequence[str], total: int) -> list[str]:
    counts = [len(runs[name]) for name in shown]
    seeds = f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"
    return [
        "# Entropy study",
        "",
        "Written by `examples/entropy_study/study.py report` (`make study`) from its runs: the quickstart's model "
        f"and task, {total} steps of 128 stratified prompts × 8 samples, two passes in 8 minibatches each (16 "
        f"updates a rollout), Adam at 1e-4, on CPU threads; {seeds} seeds a strategy, every finished run counted. "
        "A seed has its own order of the data and its own samples; the base model and the 128 held-out prompts "
        "(64 samples each) are the same.",
        "",
        "Numbers are mean ± standard deviation over seeds. Differences are paired by seed and given as mean ± "
        "standard error; **bold** where the 95 % interval excludes 0. There are many of them: about one in twenty "
        "is bold by chance. All runs one by one: [results.csv](entropy_study/results.csv), step by step: "
        "[runs.jsonl](entropy_study/runs.jsonl). What the strategies are: [entropy_control.md](entropy_control.md).",
    ]


def _missing(runs: Runs, names: Sequence[str]) -> list[str]:
    missing = [name for name in dict.fromkeys(names) if not runs.get(name)]
    if not missing:
        return []
    return [
        "## Not run yet",
        "",
        f"{', '.join(missing)}. `make study` goes on where it stopped, and adds seeds to what has few.",
    ]


def _tracking(runs: Runs, curves: dict[str, EntropyCurve], folder: str) -> list[str]:
    lines = [
        "## Following a curve",
        "",
        "Root mean square of measured entropy / target − 1 after the first tenth of the steps; the entropy is the "
        "plain mean of each step, as in `metrics.jsonl`. Noise floor: the standard error of a step's entropy, "
        "root mean square over the same steps. GRPO: its error on the same curve, same seeds.",
        "",
        "| curve | mean | each seed | noise floor | GRPO | within 5 % |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, curve in curves.items():
        errors = tracking_errors(runs[name], curve)
        floor = statistics.mean(run.noise_floor for run in runs[name].values())
        free = [run.tracking_error(curve) for seed, run in runs.get("grpo", {}).items() if seed in runs[name]]
        beside = f"{100 * statistics.mean(free):.1f} %" if free else ""
        lines.append(
            f"| {name} | {100 * statistics.mean(errors):.1f} % | {percents(errors)} "
            f"| {100 * floor:.1f} % | {beside} | {sum(e <= 0.05 for e in errors)} of {len(errors)} seeds |"
        )
    return [*lines, "", f"![tracking]({folder}/tracking.png)"]


def _strategies(runs: Runs, shown: Sequence[str], folder: str) -> list[str]:
    columns: dict[str, Callable[[Run], float]] = {
        "entropy kept": lambda run: run.entropy_kept,
        "reward": lambda run: run.mean("reward", 3),
        "gradient norm": lambda run: run.mean("grad_norm", 3),
        "clipped high": lambda run: run.mean("clip/fraction_high"),
        "clipped low": lambda run: run.mean("clip/fraction_low"),
    }
    lines = [
        "## The strategies",
        "",
        "*Entropy kept*: the mean of the last three steps over the first step's; reward and gradient norm are of "
        "the last three steps, too. Clipped: fraction of tokens with an advantage that a bound acted on, over the "
        "run.",
        "",
        "| strategy | seeds | " + " | ".join(columns) + " |",
        "| --- |" + " --- |" * (len(columns) + 1),
    ]
    for name in shown:
        cells = [spread(column(run) for run in runs[name].values()) for column in columns.values()]
        lines.append(f"| {name} | {len(runs[name])} | " + " | ".join(cells) + " |")
    return [*lines, "", f"![courses]({folder}/courses.png)"]


def _held_out(runs: Runs, shown: Sequence[str], total: int, folder: str) -> list[str]:
    lines = ["## Held-out prompts: pass@k"]
    for title, step in ((f"Half way (step {total // 2})", total // 2), (f"At the end (step {total})", total)):
        head = " | ".join(f"pass@{k}" for k in KS)
        lines += ["", f"### {title}", "", f"| strategy | {head} |", "| --- |" + " --- |" * len(KS)]
        for name in shown:
            cells = [spread(run.pass_at(k, step) for run in runs[name].values()) for k in KS]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    base = next((run for of_seed in runs.values() for run in of_seed.values()), None)
    if base is not None:
        cells = ", ".join(f"{base.pass_at(k, 0):.3f}" for k in KS)
        lines += ["", f"The base model (one evaluation): {cells}."]
    return [*lines, "", f"![pass@k]({folder}/pass_at_k.png)"]


def _claims(runs: Runs, total: int) -> list[str]:
    measures: dict[str, Callable[[Run], float]] = {
        "entropy kept": lambda run: run.entropy_kept,
        "mid pass@1": lambda run: run.pass_at(1, total // 2),
        "mid pass@64": lambda run: run.pass_at(64, total // 2),
        "final pass@1": lambda run: run.pass_at(1, total),
        "final pass@16": lambda run: run.pass_at(16, total),
        "final pass@64": lambda run: run.pass_at(64, total),
    }
    names = [n for n in (*THRESHOLDS, "floor", "target-constant", "target-rise-fall", "target-linear") if runs.get(n)]
    names = [n for n in names if set(runs[n]) & set(runs.get("grpo", {}))]
    if not names:
        return []
    table = {n: {m: difference(runs, n, "grpo", value) for m, value in measures.items()} for n in names}
    lines = [
        "## Against GRPO",
        "",
        "| strategy less GRPO | seeds | " + " | ".join(measures) + " |",
        "| --- | --- |" + " --- |" * len(measures),
        *(
            f"| {n} | {row['entropy kept'].seeds} | " + " | ".join(str(d) for d in row.values()) + " |"
            for n, row in table.items()
        ),
        "",
        "What the paper claims of its schedules, and of the thresholds they are made of, here:",
        "",
    ]
    asked = (
        ("keeps more entropy to the end than GRPO", "entropy kept", ("id", "did", "od", "upper-only", "clip-higher")),
        ("ends with less entropy than GRPO", "entropy kept", ("lower-only",)),
        ("has a higher pass@64 half way", "mid pass@64", ("id", "did", "od")),
        ("has a higher pass@1 at the end", "final pass@1", ("id", "did", "od")),
    )
    for claim, measure, of in asked:
        for name in of:
            if name in table:
                wanted = -1 if "less" in claim else 1
                lines.append(f"- {name} {claim}: {_verdict(table[name][measure], wanted)}.")
    return lines


def _verdict(found: Difference, wanted: int) -> str:
    if found.seeds < 3:
        return f"too few seeds to say ({found.mean:+.3f}, of {found.seeds})"
    numbers = f"{found.mean:+.3f} ± {found.standard_error:.3f}"
    if found.sign == wanted:
        return f"shows ({numbers})"
    if found.sign == -wanted:
        return f"the opposite shows ({numbers})"
    return f"does not show at this scale ({numbers})"


def _frontier(runs: Runs, shown: Sequence[str], total: int, folder: str) -> list[str]:
    if not runs.get("grpo"):
        return []
    lines = [
        "## Diversity against accuracy",
        "",
        "pass@16 at the end above GRPO's own course from the base model to its end, at the same pass@1 (beyond "
        "the course: above its nearest end), paired by seed. Above 0 a strategy gives more diversity for its "
        "accuracy than stopping GRPO early would.",
        "",
        "| strategy | pass@1 | pass@16 | above GRPO's course |",
        "| --- | --- | --- | --- |",
    ]
    floor: Difference | None = None
    for name in shown:
        each = [
            above_course(run, [(g.pass_at(1, s), g.pass_at(16, s)) for s in (0, total // 2, total)], total)
            for seed, run in runs[name].items()
            if (g := runs["grpo"].get(seed)) is not None
        ]
        above = Difference.of(each)
        floor = above if name == "floor" else floor
        ends = [spread(run.pass_at(k, total) for run in runs[name].values()) for k in (1, 16)]
        lines.append(f"| {name} | {ends[0]} | {ends[1]} | {'' if name == 'grpo' else above} |")
    if floor is not None and floor.seeds > 1:
        word = {1: "above", 0: "on, within its spread,", -1: "below"}[floor.sign]
        lines += ["", f"The floor mode lies {word} GRPO's frontier: {floor.mean:+.3f} ± {floor.standard_error:.3f}."]
    return [*lines, "", f"![frontier]({folder}/frontier.png)"]


def _prediction(runs: Runs, shown: Sequence[str]) -> list[str]:
    lines = [
        "## Predicted against measured entropy change",
        "",
        "Correlation, over a run's steps, of the first-order change of the step as steered (times the learning "
        "rate) with the change that its updates made at the same states; on tabular policies it is 0.997.",
        "",
        "| strategy | mean | least | greatest |",
        "| --- | --- | --- | --- |",
    ]
    for name in shown:
        values = [run.prediction_correlation for run in runs[name].values()]
        lines.append(f"| {name} | {statistics.mean(values):.2f} | {min(values):.2f} | {max(values):.2f} |")
    return lines
