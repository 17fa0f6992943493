"""What FP8 rollouts do to training, with and without corrections, on several seeds: ``make quantized-rollouts``.

    python examples/quickstart/quantized_rollouts.py [--seeds 0 1 2] [key=value ...] [--output DIR]

Trains quickstart.yaml under static clipping with rollouts from the policy's own weights, and with rollouts from weights
rounded to FP8 blocks: uncorrected, under TIS, and under IcePop. Two runs train at the same time. The table, also in
DIR/results.md, has mean and standard error over the seeds. The same command continues interrupted runs.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from math import sqrt
from pathlib import Path

import compare
from rich.console import Console

from megatron_rlvr.atomic_write import write_text
from megatron_rlvr.exit_status import EXIT_DONE, EXIT_STOPPED, user_errors_reported
from megatron_rlvr.telemetry.runs import load_run

FP8 = ["rollout.quantization=fp8"]
ARMS = {
    "own weights": [],
    "FP8": FP8,
    "FP8, TIS": [*FP8, "algorithm.objective.importance=tis"],
    "FP8, IcePop": [*FP8, "algorithm.objective.importance=icepop"],
}
LAST_STEPS = 5
COLUMNS = ("reward", "entropy", "held-out pass@1", "held-out pass@16", "KL(rollout, train)")


def results(directory: Path) -> list[float]:
    """Return what `COLUMNS` names: of the last steps, of the last evaluation, and over the run."""
    records, evaluations = load_run(directory)
    last = [statistics.mean(record[name] for record in records[-LAST_STEPS:]) for name in ("reward", "entropy")]
    kl = statistics.mean(record["kl_rollout"] for record in records)
    return [*last, evaluations[-1]["pass@1"], evaluations[-1]["pass@16"], kl]


def table(of_arms: dict[str, list[list[float]]]) -> str:
    """Return the table in Markdown: mean ± standard error over the seeds."""
    lines = [f"| rollouts | {' | '.join(COLUMNS)} |", "| --- |" + " --- |" * len(COLUMNS)]
    for name, of_seeds in of_arms.items():
        cells = []
        for values in zip(*of_seeds, strict=True):
            error = statistics.stdev(values) / sqrt(len(values)) if len(values) > 1 else 0.0
            cells.append(f"{statistics.mean(values):.3g} ± {error:.1g}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


@user_errors_reported
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="FP8 rollouts with and without corrections, on several seeds.")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of every run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds; 0 1 2 by default")
    parser.add_argument("--output", type=Path, default=Path("runs/quickstart/fp8"), help="folder of the runs")
    options = parser.parse_args(arguments)
    common = ["threads=1", "steps=32", "checkpoint.export_huggingface=false", *compare.STATIC, *options.overrides]
    runs = {
        (name, seed): compare.Run(
            f"{name.replace(', ', '-').replace(' ', '-')}-{seed}",
            options.output / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}",
            [*common, *overrides, f"seed={seed}"],
        )
        for seed in options.seeds
        for name, overrides in ARMS.items()
    }
    ordered = list(runs.values())
    for pair in zip(ordered[::2], ordered[1::2], strict=True):
        if not compare.train_to_the_end(pair, Console()):
            return EXIT_STOPPED
    text = table({name: [results(runs[name, seed].directory) for seed in options.seeds] for name in ARMS})
    write_text(options.output / "results.md", text)
    print(text, end="")
    return EXIT_DONE


if __name__ == "__main__":
    compare.interruptible()
    sys.exit(main())
