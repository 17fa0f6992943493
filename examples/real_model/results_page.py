"""Archive finished runs of show.py, and write the results on docs/real_model.md and its picture.

    python examples/real_model/results_page.py [runs/real_model/seed-* ...] [--curve NAME] [--task NAME]

Each folder holds the two runs of one seed, as ``show.py seed=1 --output runs/real_model/seed-1`` makes them. Finished
runs are added to docs/real_model/runs.jsonl, in the format of the entropy study's archive. The page and the picture
depend on the archive alone, and show every run in it. Runs on another curve than that of real_model.yaml, or with
other overrides, get a name with ``--curve``, those on another task with ``--task``, and both a table of their own. What
thresholds alone do is read from docs/real_model/authority.csv, which examples/entropy_study/authority.py writes.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import archive  # examples/entropy_study
import figure
import measurements
from authority_table import authority_section
from results import Run, Runs, percents, spread

from megatron_rlvr.config import load_config
from megatron_rlvr.telemetry.runs import load_run

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "real_model.md"
ARCHIVE = ROOT / "docs" / "real_model" / "runs.jsonl"
AUTHORITY = ROOT / "docs" / "real_model" / "authority.csv"
PICTURE = ROOT / "docs" / "real_model.png"
METRICS = (*archive.METRICS, "mixed_groups_fraction", "control/target", "control/steering")
BEGIN, END = "<!-- begin: written by examples/real_model/results_page.py -->\n", "<!-- end -->\n"
OF_TASK = ": "  # between the name of a task and that of a strategy
LAST = 3  # steps that "at the end" averages over


def finished(folders: Sequence[Path], curve: str, task: str = "") -> Runs:
    """Return the runs in ``folders`` that completed all of their steps.

    Args:
        folders: each with the runs of one seed.
        curve: name of the runs with a drawn curve.
        task: name of the task, unless it is that of real_model.yaml.
    """
    runs: Runs = {}
    for directory in (folder / name for folder in folders for name in figure.NAMES):
        if not (directory / "config.yaml").is_file():
            continue
        name = (f"{task}{OF_TASK}" if task else "") + (curve if directory.name == figure.DRAWN else directory.name)
        config = load_config(directory / "config.yaml")
        steps, evaluations = load_run(directory)
        if len(steps) == config.steps and evaluations[-1]["step"] == config.steps:
            runs.setdefault(name, {})[config.seed] = Run(name, config.seed, steps, evaluations)
    return runs


def curve_errors(runs: Runs, name: str) -> list[float]:
    """Return, for each seed, the root mean square of entropy / drawn curve - 1 after the first tenth of the steps.

    Static clipping has no curve, and is compared with that of the run of its task and seed that has one, from its own
    first entropy on.
    """
    task, separator, _ = name.rpartition(OF_TASK)
    others, errors = runs.get(task + separator + figure.DRAWN, {}), []
    for seed, run in runs[name].items():
        if (drawn := run if "control/target" in run.steps[0] else others.get(seed)) is None:
            continue
        first = math.ceil(len(run.steps) / 10)
        scale = run.steps[0]["entropy"] / drawn.steps[0]["control/target"]
        pairs = list(zip(run.steps, drawn.steps, strict=True))[first:]
        squares = [(own["entropy"] / (scale * other["control/target"]) - 1.0) ** 2 for own, other in pairs]
        errors.append(math.sqrt(statistics.mean(squares)))
    return errors


def tables(runs: Runs, measured: Sequence[measurements.Measurement] = ()) -> str:
    """Return the results as Markdown: those of every task, then other runs, then thresholds."""
    parts, shown = [task_table(runs, "")], set(figure.NAMES)
    for task in sorted({name.rpartition(OF_TASK)[0] for name in runs} - {""}):
        pair = {task + OF_TASK + name for name in figure.NAMES}
        if pair <= runs.keys():
            parts.append([f"### On the task `{task}`", "", *task_table(runs, task + OF_TASK)])
            shown |= pair
    rest = {name: of_seed for name, of_seed in runs.items() if name not in shown}
    return "\n".join([*itertools.chain(*parts), *other_runs(runs, rest), *authority_section(measured)])


def task_table(runs: Runs, task: str) -> list[str]:
    """Return the lines on one task: a row per result, a column per strategy; then the errors of every seed.

    Args:
        runs: all runs.
        task: what the names of the task's runs begin with.
    """
    static, drawn = (list(runs[task + name].values()) for name in figure.NAMES)
    steps = len(drawn[0].steps)
    rows: list[tuple[str, Callable[[Run], float], int]] = [
        ("entropy at the start, nats per token", lambda run: run.steps[0]["entropy"], 2),
        (f"entropy, last {LAST} steps", lambda run: run.mean("entropy", LAST), 2),
        ("reward at the start", lambda run: run.steps[0]["reward"], 3),
        (f"reward, last {LAST} steps", lambda run: run.mean("reward", LAST), 3),
        *(
            (f"held-out {label}, {when}", held_out(name, step), digits)
            for label, name, digits in MEASURED
            for when, step in (("start", 0), ("middle", steps // 2), ("end", steps))
        ),
        ("groups with right and wrong answers, at the start", lambda run: run.steps[0]["mixed_groups_fraction"], 2),
        (
            f"groups with right and wrong answers, last {LAST} steps",
            lambda run: run.mean("mixed_groups_fraction", LAST),
            2,
        ),
        ("tokens clipped at the upper bound", lambda run: run.mean("clip/fraction_high"), 3),
        ("tokens clipped at the lower bound", lambda run: run.mean("clip/fraction_low"), 3),
        (
            "predicted against measured entropy change, correlation over steps",
            lambda run: run.prediction_correlation,
            2,
        ),
    ]
    return [
        f"{steps} steps. Mean ± standard deviation over the seeds, if there are several:",
        "",
        f"| | {' | '.join(figure.LABELS[name] for name in figure.NAMES)} |",
        "| --- | --- | --- |",
        f"| seeds | {seeds(static)} | {seeds(drawn)} |",
        *(
            f"| {label} | {spread(map(value, static), digits)} | {spread(map(value, drawn), digits)} |"
            for label, value, digits in rows
        ),
        "",
        "Root mean square of entropy / drawn curve − 1 after the first tenth of the steps, each seed: "
        f"**{percents(curve_errors(runs, task + figure.DRAWN))} %** under target entropy. Static clipping is "
        f"{percents(curve_errors(runs, task + figure.STATIC))} % away from the curve. The standard error of a step's "
        f"entropy is {100 * statistics.mean(run.noise_floor for run in drawn):.1f} %.",
        "",
    ]


def other_runs(runs: Runs, rest: Runs) -> list[str]:
    """Return the lines of the table of those in ``rest``, which no other table shows; none if there are none."""
    if not rest:
        return []
    columns = ("other runs", "seeds", "curve error", "entropy at the start", "drawn at the end", "entropy at the end")
    lines = [f"| {' | '.join(columns)} | held-out distinct of 16 |", "| --- | --- | --- | --- | --- | --- | --- |"]
    for name, of_seed in rest.items():
        each, errors = list(of_seed.values()), curve_errors(runs, name)
        cells = [name, seeds(each), f"{percents(errors)} %" if errors else ""]
        cells.append(spread((run.steps[0]["entropy"] for run in each), 2))
        cells.append(spread((run.steps[-1].get("control/target", math.nan) for run in each), 2))
        cells.append(spread((run.steps[-1]["entropy"] for run in each), 2))
        cells.append(spread((run.evaluations[-1]["distinct_solutions"] for run in each), 2))
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


MEASURED = (("pass@1", "pass@1", 3), ("pass@8", "pass@8", 3), ("distinct right answers of 16", "distinct_solutions", 2))


def seeds(runs: Sequence[Run]) -> str:
    """Return the seeds of some runs, with commas between them."""
    return ", ".join(str(run.seed) for run in runs)


def held_out(name: str, step: int) -> Callable[[Run], float]:
    """Return what reads an evaluation after ``step`` steps."""
    return lambda run: next(record[name] for record in run.evaluations if record["step"] == step)


def page(text: str, runs: Runs, measured: Sequence[measurements.Measurement] = ()) -> str:
    """Return the page with the results in the place of those before."""
    before, _, rest = text.partition(BEGIN)
    return before + BEGIN + tables(runs, measured) + END + rest.partition(END)[2]


def main() -> None:
    parser = argparse.ArgumentParser(description="Archive runs on the real model, and write docs/real_model.md.")
    parser.add_argument("folders", nargs="*", type=Path, help="folders of finished pairs of runs")
    parser.add_argument("--curve", default=figure.DRAWN, help="name of the runs with a drawn curve, in the archive")
    parser.add_argument("--task", default="", help="name of the task, in the archive, if it is not real_model.yaml's")
    options = parser.parse_args()
    runs = archive.read(ARCHIVE)
    for name, of_seed in finished(options.folders, options.curve, options.task).items():
        runs.setdefault(name, {}).update(of_seed)
    archive.write(ARCHIVE, runs, METRICS)
    runs = archive.read(ARCHIVE)  # rounded: everything below depends on the archive alone
    figure.draw({name: [run.steps for run in runs[name].values()] for name in figure.NAMES}, PICTURE)
    text = page(PAGE.read_text(encoding="utf-8"), runs, measurements.read(AUTHORITY))
    PAGE.write_text(text, encoding="utf-8")
    print(PAGE)


if __name__ == "__main__":
    main()
