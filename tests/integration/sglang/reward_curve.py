"""The quickstart's reward curve by both engines: ``python tests/integration/sglang/reward_curve.py FOLDER``.

Not a test of every day, because the curves take minutes a seed. Runs `quickstart.yaml` with the local engine and with
SGLang, the same seeds each, so step for step on the same prompts; a run that is complete in FOLDER is kept. Status 1
when the engines differ by more than the seeds do: when the mean of the paired differences, of a curve's mean or of the
last evaluation, is more than three of its standard errors away from 0, or the mean curves are further apart at a step
than the Bonferroni bound of so many steps.
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


def run(folder: Path, engine: str, seed: int, given: argparse.Namespace) -> Path:
    """The run directory of one engine and seed, trained unless it is complete."""
    directory = folder / f"{engine}-{seed}"
    if not (directory / "metrics.jsonl").is_file() or len(read_metrics(directory)) < given.steps:
        settings = [f"run_directory={directory}", f"seed={seed}", f"steps={given.steps}", "evaluation.every=0"]
        settings += [f"rollout.engine={engine}", "telemetry.plots=false", "threads=1", "checkpoint.every=0"]
        settings += [f"rollout.sglang.python={given.python}", "checkpoint.export_huggingface=false", *given.overrides]
        command = [sys.executable, "-m", "megatron_rlvr.train", str(given.config), *settings]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        folder.mkdir(parents=True, exist_ok=True)
        with directory.with_suffix(".log").open("wb") as log:
            subprocess.run(command, env=environment, cwd=ROOT, stdout=log, stderr=log, check=True)
    return directory


def standard_error(values: list[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values))


def differs(name: str, local: list[float], sglang: list[float], drawn: int | None = None) -> bool:
    """Print both engines' mean and the paired difference; whether that is beyond three standard errors.

    A share of `drawn` completions has at least the error of drawing them, however alike few seeds happen to be.
    """
    differences = [theirs - ours for ours, theirs in zip(local, sglang, strict=True)]
    mean, error = statistics.mean(differences), standard_error(differences)
    # Three runs may agree by chance: their differences are no better known than two independent curves'.
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
    given = parser.parse_args()
    runs = {e: [run(given.folder.resolve(), e, seed, given) for seed in range(given.seeds)] for e in ENGINES}
    if given.seeds < 2:
        return
    curves = {e: [[r["reward"] for r in read_metrics(d)] for d in runs[e]] for e in ENGINES}
    within = [
        statistics.variance(values) for e in ENGINES for values in zip(*curves[e], strict=True)
    ]  # of one step's reward between seeds; pooled over steps, since three seeds tell little of a single one
    spread = math.sqrt(statistics.mean(within))
    # |z| of the largest of so many steps stays below this in all but 1 of 100 experiments without a difference.
    bound = statistics.NormalDist().inv_cdf(1 - 0.005 / given.steps) * spread * math.sqrt(2 / given.seeds)
    print(f"{'step':>4} {'local':>22} {'sglang':>22} {'difference':>11}")
    apart = 0
    for step in range(given.steps):
        a, b = ([curve[step] for curve in curves[e]] for e in ENGINES)
        difference = statistics.mean(b) - statistics.mean(a)
        apart += abs(difference) > bound
        words = [f"{statistics.mean(x):.3f} ({min(x):.3f}-{max(x):.3f})" for x in (a, b)]
        print(f"{step:>4} {words[0]:>22} {words[1]:>22} {difference:>+11.3f}")
    print(f"between seeds {spread:.4f} a step; {apart} steps further apart than {bound:.4f}")
    failed = differs("mean of the curve", *[[statistics.mean(c) for c in curves[e]] for e in ENGINES])
    last = {e: [read_metrics(d / "evaluations.jsonl")[-1] for d in runs[e]] for e in ENGINES}
    for name, drawn in (("pass@1", 256 * 16), ("pass@16", 256)):  # the quickstart's evaluation
        failed |= differs(f"held-out {name}", *[[float(r[name]) for r in last[e]] for e in ENGINES], drawn=drawn)
    mismatch = max(max(r["mismatch/max"] for r in read_metrics(d)) for d in runs["sglang"])
    print(f"largest log-prob difference between SGLang and trainer: {mismatch:.2e}")
    sys.exit(1 if failed or apart else 0)


if __name__ == "__main__":
    main()
