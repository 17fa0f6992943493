"""The entropy study: every strategy on the quickstart's model and task, several seeds each, and a report.

    python examples/entropy_study/study.py run       # make study: resumable, bounded, several runs at a time
    python examples/entropy_study/study.py report    # docs/entropy_study.md and its figures, from what has finished

A strategy is a list of overrides of the quickstart.yaml. All runs begin with the model in base_model/, which
examples/quickstart/make_base_model.py made, draw 128 stratified prompts x 8 samples a step, as many tokens as the
quickstart with its 64 x 16, and pass over them twice. Runs lie under runs/study/NAME-SEED; one that was cut off goes on
from its checkpoint, and none is started after the time limit. The report puts what has finished into
docs/entropy_study/runs.jsonl; a run that is in there is not made again, on whatever machine it was made. The long-*
runs are started only where `--only` names them.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import archive
from measurements import read as read_measurements
from report import write_report
from results import Run, Runs

from megatron_rlvr.control import EntropyCurve
from megatron_rlvr.telemetry.plots import load_run

ROOT = Path(__file__).resolve().parents[2]
RUNS = ROOT / "runs" / "study"
REPORT = ROOT / "docs" / "entropy_study.md"
ARCHIVE = REPORT.with_suffix("") / "runs.jsonl"

SCHEDULE = "algorithm.schedule"
TARGET = [f"{SCHEDULE}.name=target-entropy"]
RISE_FALL = [[0.0, 1.0], [0.4, 1.3], [0.6, 1.3], [1.0, 0.5]]
CURVES = {
    "target-rise-fall": EntropyCurve("piecewise", points=RISE_FALL),
    "target-constant": EntropyCurve("constant"),
    "target-linear": EntropyCurve("linear", end=0.4),
}
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
        f"{SCHEDULE}.points={RISE_FALL}".replace(" ", ""),
    ],
    "target-linear": [*TARGET, f"{SCHEDULE}.curve=linear", f"{SCHEDULE}.end=0.4"],
    "floor": [f"{SCHEDULE}.name=entropy-floor"],
    "ce-gppo": [f"{SCHEDULE}.name=constant", "algorithm.objective.name=ce-gppo"],
}
# Where thresholds have more to do: setting -> label -> strategy, made of the overrides of both.
STEEP = [f"{SCHEDULE}.upper_intercept=3.0", f"{SCHEDULE}.upper_slope=-2.8"]
THRESHOLDS = {
    "static": STRATEGIES["grpo"],
    "upper": STRATEGIES["upper-only"],
    "steep": [f"{SCHEDULE}.name=constant", *STEEP],
    "lower": STRATEGIES["lower-only"],
    "id": STRATEGIES["id"],
    "id-steep": [*STRATEGIES["id"], *STEEP],
}
SETTINGS = {
    "4 passes": ["algorithm.epochs=4"],
    "coin, 4 passes": ["algorithm.epochs=4", "verifier.name=coin:toss", "data.heldout=null"],
}
REGIMES = {
    setting: {label: f"{setting.replace(', ', '-').replace(' ', '-')}-{label}" for label in THRESHOLDS}
    for setting in SETTINGS
}
REGIME_RUNS = {
    name: [*THRESHOLDS[label], *SETTINGS[setting]]
    for setting, names in REGIMES.items()
    for label, name in names.items()
}
# What builds up over more steps; each run takes 6 times as long.
LONG_STEPS = 200
LONG = {
    f"long-{name}": STRATEGIES[name]
    for name in ("grpo", "clip-higher", "upper-only", "lower-only", "id", "did", "od", "floor", "target-linear")
}
CURVES |= {name: CURVES[base] for name in LONG if (base := name.removeprefix("long-")) in CURVES}
SPLITS = {f"id-split-{split}": [*STRATEGIES["id"], f"{SCHEDULE}.split={split}"] for split in (0.3, 0.4, 0.6)}
FAMILIES = (STRATEGIES, SPLITS, REGIME_RUNS, LONG)
EVERYTHING = STRATEGIES | SPLITS | REGIME_RUNS | LONG
COMMON = [
    "threads=1",
    "model.path=examples/entropy_study/base_model",
    "data.train=runs/study/data/train.jsonl",
    "data.heldout=runs/study/data/heldout.jsonl",
    "data.stratify_key=kind",
    "rollout.prompts_per_step=128",
    "rollout.samples_per_prompt=8",
    "algorithm.epochs=2",
    "evaluation.prompts=128",
    "evaluation.samples=64",
    "checkpoint.keep=4",
    "checkpoint.export_huggingface=false",
    "telemetry.plots=false",
    "telemetry.tensorboard=false",
]


def steps_of(name: str, steps: int) -> int:
    """How many steps a run of a strategy has in a study of so many."""
    return LONG_STEPS if name in LONG else steps


def run(names: Sequence[str], seeds: int, steps: int, jobs: int, hours: float) -> int:
    """Start the runs that have not finished, `jobs` at a time; 1 if any failed.

    Strategies come first, then the ablations, each seed by seed, so that a study cut short has as many seeds of each.
    """
    done = load_runs(steps)
    waiting = [
        (name, seed)
        for family in FAMILIES
        for seed in range(seeds)
        for name in names
        if name in family and seed not in done.get(name, {})
    ]
    print(f"{len(waiting)} of {len(names) * seeds} runs to do, {jobs} at a time", flush=True)
    deadline = time.monotonic() + hours * 3600
    running: dict[subprocess.Popen[bytes], str] = {}
    failed: list[str] = []
    while waiting or running:
        while waiting and len(running) < jobs and time.monotonic() < deadline:
            name, seed = waiting.pop(0)
            running[_start(name, seed, steps_of(name, steps))] = f"{name}-{seed}"
        for process in [p for p in running if p.poll() is not None]:
            label = running.pop(process)
            print(f"{'done' if process.returncode == 0 else 'FAILED'}  {label}", flush=True)
            if process.returncode:
                failed.append(label)
        if waiting and not running and time.monotonic() >= deadline:
            print(f"time limit reached with {len(waiting)} runs left: start the same command again", flush=True)
            break
        time.sleep(0.5)
    for label in failed:
        print(f"see {RUNS / label}.log", file=sys.stderr)
    return 1 if failed else 0


def _start(name: str, seed: int, steps: int) -> subprocess.Popen[bytes]:
    RUNS.mkdir(parents=True, exist_ok=True)
    arguments = [f"name={name}", f"seed={seed}", f"steps={steps}", f"run_directory={RUNS / f'{name}-{seed}'}"]
    arguments += [f"evaluation.every={steps // 2}", f"checkpoint.every={steps // 4}", *COMMON, *EVERYTHING[name]]
    command = [sys.executable, "-m", "megatron_rlvr.train", "examples/quickstart/quickstart.yaml", *arguments]
    with (RUNS / f"{name}-{seed}.log").open("ab") as log:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)}
        return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env=environment)


def finished(directory: Path, steps: int) -> bool:
    """Whether the run in `directory` got to the end of its `steps`."""
    return (directory / "checkpoints" / f"step_{steps}" / "run.json").is_file()


def load_runs(steps: int) -> Runs:
    """All finished runs of a study of ``steps`` steps, from the archive and from this machine."""
    found: Runs = {}
    for name, of_seed in archive.read(ARCHIVE).items():
        whole = {seed: run for seed, run in of_seed.items() if len(run.steps) == steps_of(name, steps)}
        if name in EVERYTHING and whole:
            found[name] = whole
    for name in EVERYTHING:
        for directory in sorted(RUNS.glob(f"{name}-[0-9]*")):
            seed = directory.name.removeprefix(f"{name}-")
            if seed.isdigit() and directory.is_dir() and finished(directory, steps_of(name, steps)):
                found.setdefault(name, {})[int(seed)] = Run(name, int(seed), *load_run(directory))
    return found


def report(steps: int) -> None:
    """Write the report of every strategy that has at least one finished run."""
    runs = load_runs(steps)
    if not any(runs.get(name) for name in STRATEGIES):
        sys.exit(f"no finished run of {steps} steps under {RUNS}: run the study first")
    archive.write(ARCHIVE, runs)
    splits = {"0.3": "id-split-0.3", "0.4": "id-split-0.4", "0.5": "id", "0.6": "id-split-0.6"}
    measurements = read_measurements(REPORT.with_suffix("") / "authority.csv")
    write_report(runs, list(STRATEGIES), CURVES, splits, REGIMES, list(LONG), measurements, steps, REPORT)
    print(REPORT)


def main() -> int:
    parser = argparse.ArgumentParser(description="Run the entropy study, or write its report.")
    parser.add_argument("action", choices=["run", "report"])
    parser.add_argument("--only", nargs="+", choices=list(EVERYTHING), help="these (default: all but the long runs)")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time, one thread each")
    parser.add_argument("--hours", type=float, default=2.0, help="start no run after this time")
    options = parser.parse_args()
    names = options.only or [name for name in EVERYTHING if name not in LONG]
    if options.action == "report":
        report(options.steps)
        return 0
    return run(names, options.seeds, options.steps, options.jobs, options.hours)


if __name__ == "__main__":
    sys.exit(main())
