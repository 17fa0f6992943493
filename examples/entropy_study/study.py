"""The entropy study: every strategy on the quickstart's model and task, several seeds each, and a report.

    python examples/entropy_study/study.py run       # make study: resumable, bounded, several runs at a time
    python examples/entropy_study/study.py report    # docs/entropy_study.md and its figures, from what has finished

A strategy is a list of overrides of the quickstart.yaml. All runs draw 128 stratified prompts x 8 samples a step, as
many tokens as the quickstart with its 64 x 16, and pass over them twice. Runs lie under runs/study/NAME-SEED; one that
has finished is skipped, one that was cut off goes on from its checkpoint, and none is started after the time limit.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_rlvr.telemetry.metrics import Record
from megatron_rlvr.telemetry.plots import RunGroup, load_run, plot_groups

ROOT = Path(__file__).resolve().parents[2]
RUNS = ROOT / "runs" / "study"
REPORT = ROOT / "docs" / "entropy_study.md"
FIGURES = ROOT / "docs" / "entropy_study"

SCHEDULE = "algorithm.schedule"
TARGET = [f"{SCHEDULE}.name=target-entropy"]
STRATEGIES: dict[str, list[str]] = {
    "grpo": [f"{SCHEDULE}.name=constant"],
    "clip-higher": [f"{SCHEDULE}.name=clip-higher"],
    "upper-only": [
        f"{SCHEDULE}.name=constant",
        f"{SCHEDULE}.upper_intercept=0.5",
        f"{SCHEDULE}.upper_slope=-0.25",
    ],
    "lower-only": [
        f"{SCHEDULE}.name=constant",
        f"{SCHEDULE}.lower_intercept=0.3",
        f"{SCHEDULE}.lower_slope=-0.13",
    ],
    "id": [f"{SCHEDULE}.name=increase-then-decrease"],
    "did": [f"{SCHEDULE}.name=decrease-increase-decrease"],
    "od": [f"{SCHEDULE}.name=oscillatory-decay"],
    "target-constant": TARGET,
    "target-rise-fall": [
        *TARGET,
        f"{SCHEDULE}.curve=piecewise",
        f"{SCHEDULE}.points=[[0.0,1.0],[0.4,1.3],[0.6,1.3],[1.0,0.5]]",
    ],
    "target-linear": [*TARGET, f"{SCHEDULE}.curve=linear", f"{SCHEDULE}.end=0.4"],
    "floor": [f"{SCHEDULE}.name=entropy-floor"],
    "ce-gppo": [f"{SCHEDULE}.name=constant", "algorithm.objective.name=ce-gppo"],
}
# What thresholds alone can do: more updates a rollout, and a higher learning rate.
BOUNDS = {
    "static": STRATEGIES["grpo"],
    "upper": STRATEGIES["upper-only"],
    "steep": [f"{SCHEDULE}.name=constant", f"{SCHEDULE}.upper_intercept=3.0", f"{SCHEDULE}.upper_slope=-2.8"],
    "lower": STRATEGIES["lower-only"],
}
SETTINGS = {
    "2x1e-4": ["algorithm.epochs=2", "optimizer.learning_rate=1e-4"],
    "4x1e-4": ["algorithm.epochs=4", "optimizer.learning_rate=1e-4"],
    "2x3e-4": ["algorithm.epochs=2", "optimizer.learning_rate=3e-4"],
}
AUTHORITY = {
    f"authority-{bound}-{setting}": [*overrides, *more, "evaluation.prompts=64", "evaluation.samples=16"]
    for setting, more in SETTINGS.items()
    for bound, overrides in BOUNDS.items()
}
SPLITS = {f"id-split-{split}": [*STRATEGIES["id"], f"{SCHEDULE}.split={split}"] for split in (0.3, 0.4, 0.6)}
COMMON = [
    "threads=1",
    "data.train=runs/study/data/train.jsonl",
    "data.heldout=runs/study/data/heldout.jsonl",
    "data.stratify_key=kind",
    "rollout.prompts_per_step=128",
    "rollout.samples_per_prompt=8",
    "algorithm.epochs=2",
    "evaluation.prompts=128",
    "evaluation.samples=64",
    "checkpoint.keep=1",
    "checkpoint.export_huggingface=false",
    "telemetry.plots=false",
    "telemetry.tensorboard=false",
]


def run(names: Sequence[str], seeds: int, steps: int, jobs: int, hours: float) -> int:
    """Start the runs that have not finished, `jobs` at a time, seed by seed; 1 if any failed or was left out."""
    everything = STRATEGIES | SPLITS | AUTHORITY
    waiting = [(name, seed) for seed in range(seeds) for name in names if not finished(RUNS / f"{name}-{seed}", steps)]
    print(f"{len(waiting)} of {len(names) * seeds} runs to do, {jobs} at a time", flush=True)
    deadline = time.monotonic() + hours * 3600
    running: dict[subprocess.Popen[bytes], str] = {}
    failed: list[str] = []
    while waiting or running:
        while waiting and len(running) < jobs and time.monotonic() < deadline:
            name, seed = waiting.pop(0)
            running[_start(name, seed, steps, everything[name])] = f"{name}-{seed}"
        for process in [p for p in running if p.poll() is not None]:
            label = running.pop(process)
            print(f"{'done' if process.returncode == 0 else 'FAILED'}  {label}", flush=True)
            if process.returncode:
                failed.append(label)
        if not running and time.monotonic() >= deadline:
            print(f"time limit reached with {len(waiting)} runs left: start the same command again", flush=True)
            break
        time.sleep(0.5)
    for label in failed:
        print(f"see {RUNS / label}.log", file=sys.stderr)
    return 1 if failed or waiting else 0


def _start(name: str, seed: int, steps: int, overrides: Sequence[str]) -> subprocess.Popen[bytes]:
    RUNS.mkdir(parents=True, exist_ok=True)
    arguments = [f"name={name}", f"seed={seed}", f"steps={steps}", f"run_directory={RUNS / f'{name}-{seed}'}"]
    arguments += [f"evaluation.every={steps // 2}", f"checkpoint.every={steps // 2}", *COMMON, *overrides]
    command = [sys.executable, "-m", "megatron_rlvr.train", "examples/quickstart/quickstart.yaml", *arguments]
    with (RUNS / f"{name}-{seed}.log").open("ab") as log:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env=environment)


def finished(directory: Path, steps: int) -> bool:
    """Whether the run in `directory` got to the end of its `steps`."""
    return (directory / "checkpoints" / f"step_{steps}" / "run.json").is_file()


def report(names: Sequence[str], steps: int) -> None:
    """Write the report of every strategy that has at least one finished run."""
    groups = []
    for name in names:
        done = [d for d in sorted(RUNS.glob(f"{name}-[0-9]*")) if d.is_dir() and finished(d, steps)]
        loaded = [load_run(d) for d in done if d.name.removeprefix(f"{name}-").isdigit()]
        if loaded:
            groups.append(RunGroup(name, [records for records, _ in loaded], [e for _, e in loaded]))
    if not groups:
        sys.exit(f"no finished run of {steps} steps under {RUNS}: run the study first")
    main = [g for g in groups if g.label in STRATEGIES]
    families = {
        "thresholds": [g for g in main if not g.label.startswith(("target", "floor"))],
        "target": [g for g in main if g.label.startswith(("target", "floor", "grpo"))],
        "splits": [g for g in groups if g.label == "id" or g.label in SPLITS],
    }
    for family, members in families.items():
        if members:
            plot_groups(members, f"Entropy study: {family}", FIGURES / family)
    REPORT.write_text(_text(groups, families, steps))
    print(REPORT)


def _text(groups: Sequence[RunGroup], families: dict[str, list[RunGroup]], steps: int) -> str:
    lines = [
        "# Entropy study",
        "",
        f"Made by `make study`: the quickstart's model and task, {steps} steps, "
        f"{min(len(g.runs) for g in groups)} to {max(len(g.runs) for g in groups)} seeds a strategy. "
        "Every number is the mean over seeds ± their standard deviation; nothing is left out.",
        "Entropy is in nats a token; *kept* is the mean of the last three steps over the first step's.",
        "",
    ]
    lines += _table(
        groups,
        {
            "seeds": lambda run, evaluations: math.nan,
            "entropy kept": lambda run, evaluations: _end(run, "entropy") / run[0]["entropy"],
            "reward": lambda run, evaluations: _end(run, "reward"),
            "gradient norm": lambda run, evaluations: _end(run, "grad_norm"),
            "clipped high": lambda run, evaluations: _mean(run, "clip/fraction_high"),
            "clipped low": lambda run, evaluations: _mean(run, "clip/fraction_low"),
            "tracking error": _tracking_error,
        },
    )
    for title, at in (("half way", steps // 2), ("at the end", steps)):
        lines += [f"## Held-out prompts {title}", ""]
        columns = {f"pass@{2**e}": _pass_at(f"pass@{2**e}", at) for e in range(7)}
        lines += _table(groups, columns)
    for family, members in families.items():
        if members:
            lines += [f"## Figures: {family}", "", f"![{family}](entropy_study/{family}/overview.png)", ""]
    return "\n".join(lines)


Column = Callable[[list[Record], list[Record]], float]


def _table(groups: Sequence[RunGroup], columns: dict[str, Column]) -> list[str]:
    lines = ["| strategy | " + " | ".join(columns) + " |", "| --- |" + " --- |" * len(columns)]
    for group in groups:
        cells = []
        for label, column in columns.items():
            values = [column(r, e) for r, e in zip(group.runs, group.evaluations, strict=True)]
            cells.append(str(len(group.runs)) if label == "seeds" else _spread(values))
        lines.append(f"| {group.label} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def _spread(values: Sequence[float]) -> str:
    finite = [v for v in values if math.isfinite(v)]
    if not finite:
        return ""
    deviation = statistics.stdev(finite) if len(finite) > 1 else 0.0
    return f"{statistics.mean(finite):.3f} ± {deviation:.3f}"


def _mean(run: Sequence[Record], name: str) -> float:
    return statistics.mean(record[name] for record in run)


def _end(run: Sequence[Record], name: str) -> float:
    return _mean(run[-3:], name)


def _tracking_error(run: list[Record], evaluations: list[Record]) -> float:
    """Root mean square of measured / target - 1 after the first tenth of the steps."""
    errors = [r["control/error"] for r in run[len(run) // 10 :] if "control/error" in r]
    return math.sqrt(statistics.mean(e * e for e in errors)) if errors else math.nan


def _pass_at(name: str, step: int) -> Column:
    def value(run: list[Record], evaluations: list[Record]) -> float:
        return next((e[name] for e in evaluations if e["step"] == step), math.nan)

    return value


def main() -> int:
    parser = argparse.ArgumentParser(description="Run the entropy study, or write its report.")
    parser.add_argument("action", choices=["run", "report"])
    parser.add_argument(
        "--only", nargs="+", choices=[*STRATEGIES, *SPLITS, *AUTHORITY], help="these strategies (default: all)"
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time, one thread each")
    parser.add_argument("--hours", type=float, default=2.0, help="start no run after this time")
    options = parser.parse_args()
    names = options.only or [*STRATEGIES, *SPLITS, *AUTHORITY]
    if options.action == "report":
        report(names, options.steps)
        return 0
    return run(names, options.seeds, options.steps, options.jobs, options.hours)


if __name__ == "__main__":
    sys.exit(main())
