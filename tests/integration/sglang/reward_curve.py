"""The quickstart's reward curve with both engines: ``python tests/integration/sglang/reward_curve.py FOLDER``.

Runs `quickstart.yaml` with the local engine and with SGLang, with the same seeds and so with the same prompts in every
step. A run that is complete in FOLDER is reused. The exit status is 1 when the engines differ by more than the seeds
do, which means one of:

- the mean of the paired differences, of the curves' means or of the last evaluation, is more than three standard errors
  from 0;
- at some step, the mean curves differ by more than the Bonferroni bound for the number of steps.

Not part of the test suite, because a curve takes minutes per seed.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import subprocess
import sys
from pathlib import Path

from megatron_rlvr.telemetry.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[3]
ENGINES = ("local", "sglang")


def run(folder: Path, engine: str, seed: int, options: argparse.Namespace) -> Path:
    """Train with one engine and seed, unless that run is complete; returns its directory."""
    directory = folder / f"{engine}-{seed}"
    if not (directory / "metrics.jsonl").is_file() or len(read_metrics(directory)) < options.steps:
        settings = [f"run_directory={directory}", f"seed={seed}", f"steps={options.steps}", "evaluation.every=0"]
        settings += [f"rollout.engine={engine}", "telemetry.plots=false", "threads=1", "checkpoint.every=0"]
        settings += [
            f"rollout.sglang.python={options.python}",
            "checkpoint.export_huggingface=false",
            *options.overrides,
        ]
        command = [sys.executable, "-m", "megatron_rlvr.train", str(options.config), *settings]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        folder.mkdir(parents=True, exist_ok=True)
        with directory.with_suffix(".log").open("wb") as log:
            subprocess.run(command, env=environment, cwd=ROOT, stdout=log, stderr=log, check=True)
    return directory


def standard_error(values: list[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values))


def differs(name: str, local: list[float], sglang: list[float], drawn: int | None = None) -> bool:
    """Print the mean of both engines and the paired difference; returns whether it exceeds three standard errors.

    Args:
        name: name of the quantity.
        local, sglang: values with each engine, one per seed.
        drawn: for a share, the number of draws that it is measured from. Its error is at least that of the draws,
            however similar a few seeds happen to be.
    """
    differences = [b - a for a, b in zip(local, sglang, strict=True)]
    mean, error = statistics.mean(differences), standard_error(differences)
    # Three runs may agree by chance, so the error is at least that of two independent curves.
    error = max(error, math.hypot(standard_error(local), standard_error(sglang)))
    if drawn is not None:
        share = statistics.mean([*local, *sglang])
        error = max(error, math.sqrt(2 * share * (1 - share) / drawn / len(local)))
    print(
        f"{name}: local {statistics.mean(local):.4f} ({min(local):.4f} to {max(local):.4f}), sglang "
        f"{statistics.mean(sglang):.4f} ({min(sglang):.4f} to {max(sglang):.4f}), difference {mean:+.4f} +- {error:.4f}"
    )
    return abs(mean) > 3 * error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("overrides", nargs="*", help="settings of both engines, key=value")
    parser.add_argument("--config", type=Path, default=ROOT / "examples" / "quickstart" / "quickstart.yaml")
    parser.add_argument("--python", type=Path, default=ROOT / ".venv-sglang" / "bin" / "python")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    options = parser.parse_args()
    runs = {e: [run(options.folder.resolve(), e, seed, options) for seed in range(options.seeds)] for e in ENGINES}
    if options.seeds < 2:
        return
    curves = {e: [[r["reward"] for r in read_metrics(d)] for d in runs[e]] for e in ENGINES}
    # The variance of a step's reward between seeds is pooled over steps, because three seeds are too few for one step.
    variances = [statistics.variance(values) for e in ENGINES for values in zip(*curves[e], strict=True)]
    spread = math.sqrt(statistics.mean(variances))
    # Without a difference between the engines, the largest |z| of all steps exceeds this in 1 of 100 experiments.
    bound = statistics.NormalDist().inv_cdf(1 - 0.005 / options.steps) * spread * math.sqrt(2 / options.seeds)
    print(f"{'step':>4} {'local':>22} {'sglang':>22} {'difference':>11}")
    apart = 0
    for step in range(options.steps):
        a, b = ([curve[step] for curve in curves[e]] for e in ENGINES)
        difference = statistics.mean(b) - statistics.mean(a)
        apart += abs(difference) > bound
        words = [f"{statistics.mean(x):.3f} ({min(x):.3f}-{max(x):.3f})" for x in (a, b)]
        print(f"{step:>4} {words[0]:>22} {words[1]:>22} {difference:>+11.3f}")
    print(f"standard deviation between seeds, per step: {spread:.4f}; {apart} steps differ by more than {bound:.4f}")
    failed = differs("mean of the curve", *[[statistics.mean(c) for c in curves[e]] for e in ENGINES])
    last = {e: [read_metrics(d / "evaluations.jsonl")[-1] for d in runs[e]] for e in ENGINES}
    for name, drawn in (("pass@1", 256 * 16), ("pass@16", 256)):  # as many draws as in the quickstart's evaluation
        failed |= differs(f"held-out {name}", *[[float(r[name]) for r in last[e]] for e in ENGINES], drawn=drawn)
    mismatch = max(max(r["mismatch/max"] for r in read_metrics(d)) for d in runs["sglang"])
    print(f"largest log-prob difference between SGLang and trainer: {mismatch:.2e}")
    sys.exit(1 if failed or apart else 0)


if __name__ == "__main__":
    main()
