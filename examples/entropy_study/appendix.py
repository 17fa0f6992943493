"""The report's appendix: what each strategy sets, and the long tables that its sections summarise."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Sequence

from measurements import OTHERS, PASSES, RATES, REWARDS, Measurement, by_setting
from results import KS, Difference, Run, Runs, difference, spread
from strategies import EVERYTHING


def strategies_table(runs: Runs, shown: Sequence[str], folder: str) -> list[str]:
    """Entropy, reward and clipping of every strategy, and its overrides."""
    columns: dict[str, Callable[[Run], float]] = {
        "entropy kept": lambda run: run.entropy_kept,
        "reward": lambda run: run.mean("reward", 3),
        "gradient norm": lambda run: run.mean("grad_norm", 3),
        "clipped high": lambda run: run.mean("clip/fraction_high"),
        "clipped low": lambda run: run.mean("clip/fraction_low"),
    }
    lines = [
        "### The strategies",
        "",
        "*Entropy kept* is the mean entropy of the last three steps divided by the entropy of the first step. Reward "
        "and gradient norm are means over the last three steps. *Clipped* is the fraction of tokens with a nonzero "
        "advantage on which a bound acted, over the run.",
        "",
        "| strategy | seeds | " + " | ".join(columns) + " |",
        "| --- |" + " --- |" * (len(columns) + 1),
    ]
    for name in shown:
        cells = [spread(column(run) for run in runs[name].values()) for column in columns.values()]
        lines.append(f"| {name} | {len(runs[name])} | " + " | ".join(cells) + " |")
    lines += [
        "",
        f"![Entropy, reward and gradient norm of every strategy]({folder}/courses.png)",
        "",
        "What each strategy sets, on top of the settings that all share:",
        "",
        "| strategy | overrides of quickstart.yaml |",
        "| --- | --- |",
    ]
    return [*lines, *(f"| {name} | {' '.join(f'`{override}`' for override in EVERYTHING[name])} |" for name in shown)]


def held_out_tables(runs: Runs, shown: Sequence[str], total: int, folder: str) -> list[str]:
    """pass@k of every strategy, halfway and at the end."""
    lines = ["### Held-out prompts: pass@k"]
    for title, step in ((f"Halfway (step {total // 2})", total // 2), (f"At the end (step {total})", total)):
        head = " | ".join(f"pass@{k}" for k in KS)
        lines += ["", f"{title}:", "", f"| strategy | {head} |", "| --- |" + " --- |" * len(KS)]
        for name in shown:
            cells = [spread(run.pass_at(k, step) for run in runs[name].values()) for k in KS]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        if step == total:
            base = next((run for of_seed in runs.values() for run in of_seed.values()), None)
            if base is not None:
                cells = [f"{base.pass_at(k, 0):.3f}" for k in KS]
                lines.append("| base model (one evaluation) | " + " | ".join(cells) + " |")
    return [*lines, "", f"![pass@k over k, halfway and at the end]({folder}/pass_at_k.png)"]


def differences_table(table: dict[str, dict[str, Difference]]) -> list[str]:
    """``table``: strategy -> measure -> difference to GRPO."""
    if not table:
        return []
    measures = list(next(iter(table.values())))
    return [
        "### Differences to GRPO",
        "",
        "| strategy minus GRPO | seeds | " + " | ".join(measures) + " |",
        "| --- | --- |" + " --- |" * len(measures),
        *(
            f"| {n} | {row['entropy kept'].seeds} | " + " | ".join(str(d) for d in row.values()) + " |"
            for n, row in table.items()
        ),
    ]


def authority_table(measurements: Sequence[Measurement]) -> list[str]:
    """What each constant threshold does to the entropy of one rollout."""
    if not measurements:
        return []
    lines = [
        "### Entropy change of one rollout under each threshold",
        "",
        "- *static* is the change of ln entropy on the same tokens, in percent per rollout.",
        "- *minus static* is the paired difference; bold as above.",
        "- *coin* rows use the same rollouts with random rewards, so there is nothing to learn.",
        "- *rollouts to 10 %* is the number of rollouts after which the difference of *upper* would add up to a tenth "
        "of the entropy. It is empty where the difference is not resolved or negative.",
        "",
        "| rewards | learning rate | passes | static, % | "
        + " | ".join(f"{b} minus static, %" for b in OTHERS)
        + " | clipped high, low | rollouts to 10 % |",
        "| --- | --- | --- | --- |" + " --- |" * (len(OTHERS) + 2),
    ]
    settings = by_setting(measurements)
    for rewards, rate, passes in itertools.product(REWARDS, RATES, PASSES):
        if not (comparisons := settings.get((rewards, rate, passes))):
            continue
        static = [comparison.static for comparison in comparisons]
        differences = {bound: Difference.of([each.added(bound) for each in comparisons]) for bound in OTHERS}
        upper = differences["upper"]
        rollouts = f"{10 / upper.mean:.0f}" if upper.sign > 0 else ""
        clipped = ", ".join(
            f"{100 * statistics.mean(getattr(m, name) for m in static):.1f} %"
            for name in ("clipped_high", "clipped_low")
        )
        lines.append(
            f"| {rewards} | {rate:g} | {passes} | {spread((100 * m.shift for m in static), 1)} | "
            + " | ".join(differences[bound].text(2) for bound in OTHERS)
            + f" | {clipped} | {rollouts} |"
        )
    return lines


def splits_table(runs: Runs, splits: dict[str, str], total: int) -> list[str]:
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
        "### Where increase-then-decrease is split",
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


def prediction_table(runs: Runs, shown: Sequence[str]) -> list[str]:
    """Per strategy, the correlation of predicted and measured entropy change over the steps of a run."""
    lines = [
        "### Correlation of predicted and measured entropy change",
        "",
        "| strategy | mean | least | greatest |",
        "| --- | --- | --- | --- |",
    ]
    for name in shown:
        values = [run.prediction_correlation for run in runs[name].values()]
        lines.append(f"| {name} | {statistics.mean(values):.2f} | {min(values):.2f} | {max(values):.2f} |")
    return lines
