"""Records of a synthetic run under increase-then-decrease."""

import json
from pathlib import Path

import numpy

STEPS = 12


def records(seed: int = 0, steps: int = STEPS) -> list[dict]:
    noise = numpy.random.default_rng(seed)
    made = []
    for step in range(steps):
        rising = step < steps / 2
        made.append(
            {
                "step": step,
                "reward": 0.2 + 0.02 * step + noise.normal(0, 0.002),
                "entropy": 0.4 + (0.02 * step if rising else 0.02 * (steps - 2 * step)) + noise.normal(0, 0.002),
                "clip/upper_intercept": 0.5 if rising else 0.2,
                "clip/upper_slope": -0.25 if rising else 0.0,
                "clip/lower_intercept": 0.2 if rising else 0.3,
                "clip/lower_slope": 0.0 if rising else -0.13,
                "clip/fraction_high": 0.010,
                "clip/fraction_low": 0.031,
                **{f"region/E{i}": share for i, share in enumerate((0.45, 0.1, 0.35, 0.1), start=1)},
                "entropy_change/predicted": 0.01,
                "entropy_change/measured": 0.009,
                "grad_norm": 0.4,
                "kl_rollout": 1e-7,
                "response_length": 15.5,
                "time/step": 3.0,
            }
        )
    return made


def evaluations(steps: int = STEPS) -> list[dict]:
    return [
        {"step": 0, "reward": 0.21, "pass@1": 0.21, "pass@8": 0.6, "pass@16": 0.86},
        {"step": steps, "reward": 0.43, "pass@1": 0.43, "pass@8": 0.65, "pass@16": 0.68},
    ]


def write_run(directory: Path, seed: int = 0, schedule: str = "id", name: str = "study") -> Path:
    directory.mkdir(parents=True)
    (directory / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records(seed)))
    (directory / "evaluations.jsonl").write_text("".join(json.dumps(r) + "\n" for r in evaluations()))
    (directory / "config.yaml").write_text(
        f"name: {name}\nseed: {seed}\nrun_directory: {directory}\nalgorithm:\n  schedule: {{name: {schedule}}}\n"
    )
    return directory
