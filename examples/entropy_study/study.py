"""The entropy study: train with every strategy on the quickstart's task, several seeds each, and write the report.

    python examples/entropy_study/study.py run       # start or continue the runs (make study)
    python examples/entropy_study/study.py report    # write docs/entropy_study.md and its figures

A strategy is a list of overrides of quickstart.yaml (strategies.py). All runs start from the model in base_model/,
which examples/quickstart/make_base_model.py made. Each step draws 128 stratified prompts with 8 samples each, as many
completions as the quickstart's 64 x 16, and makes two passes over them.

Runs are written to runs/study/NAME-SEED. An interrupted run continues from its checkpoint; no run starts after the time
limit. ``report`` adds finished runs to the archive docs/entropy_study/runs.jsonl. Archived runs are never repeated,
whichever machine made them. The long-* runs start only if ``--only`` names them.
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
from strategies import COMMON, EVERYTHING, FAMILIES, LONG, STRATEGIES, steps_of

from megatron_rlvr.telemetry.runs import load_run

ROOT = Path(__file__).resolve().parents[2]
RUNS = ROOT / "runs" / "study"
REPORT = ROOT / "docs" / "entropy_study.md"
ARCHIVE = REPORT.with_suffix("") / "runs.jsonl"


def run(names: Sequence[str], seeds: int, steps: int, jobs: int, hours: float) -> int:
    """Start the runs that have not finished, ``jobs`` at a time; return 1 if any failed, else 0.

    The main strategies come first, then the ablations, seed by seed: a study that is cut short has the same number of
    seeds of each strategy.
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
            print(f"time limit reached with {len(waiting)} runs left; run the same command again", flush=True)
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
    """Whether the run in ``directory`` completed all of its ``steps``."""
    return (directory / "checkpoints" / f"step_{steps}" / "run.json").is_file()


def load_runs(steps: int) -> Runs:
    """All finished runs of a study of ``steps`` steps, from the archive and from this machine."""
    runs: Runs = {}
    for name, of_seed in archive.read(ARCHIVE).items():
        complete = {seed: run for seed, run in of_seed.items() if len(run.steps) == steps_of(name, steps)}
        if name in EVERYTHING and complete:
            runs[name] = complete
    for name in EVERYTHING:
        for directory in sorted(RUNS.glob(f"{name}-[0-9]*")):
            seed = directory.name.removeprefix(f"{name}-")
            if seed.isdigit() and directory.is_dir() and finished(directory, steps_of(name, steps)):
                runs.setdefault(name, {})[int(seed)] = Run(name, int(seed), *load_run(directory))
    return runs


def report(steps: int) -> None:
    """Archive the finished runs and write the report of every strategy that has at least one."""
    runs = load_runs(steps)
    if not any(runs.get(name) for name in STRATEGIES):
        sys.exit(f"no finished run of {steps} steps in {RUNS}; run the study first")
    archive.write(ARCHIVE, runs)
    # From the archive, whose numbers are rounded: the report then depends on the archive alone.
    write_report(archive.read(ARCHIVE), read_measurements(REPORT.with_suffix("") / "authority.csv"), steps, REPORT)
    print(REPORT)


def main() -> int:
    parser = argparse.ArgumentParser(description="Run the entropy study, or write its report.")
    parser.add_argument("action", choices=["run", "report"])
    parser.add_argument(
        "--only", nargs="+", choices=list(EVERYTHING), help="strategies to run (default: all but the long runs)"
    )
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
