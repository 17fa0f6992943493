"""The study's finished runs in one file that is kept with the project, so that machines and days add up.

One JSON line a run: of every step what the report needs, and all evaluations. Numbers have six significant digits.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from results import Run, Runs

from megatron_rlvr.telemetry.metrics import Record

METRICS = (
    "step",
    "entropy",
    "entropy_standard_error",
    "reward",
    "grad_norm",
    "ratio_max",
    "clip/fraction_high",
    "clip/fraction_low",
    "entropy_change/predicted",
    "entropy_change/measured",
    "lr",
)


def read(path: Path) -> Runs:
    """The runs of an archive; none where there is no file."""
    runs: Runs = {}
    if path.is_file():
        for line in path.read_text().splitlines():
            row = json.loads(line)
            columns: dict[str, list[float]] = row["steps"]
            steps = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
            run = Run(row["strategy"], row["seed"], steps, row["evaluations"])
            runs.setdefault(run.strategy, {})[run.seed] = run
    return runs


def write(path: Path, runs: Runs) -> None:
    """Write ``runs``, in order of strategy and seed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [_line(run) for _, of_seed in sorted(runs.items()) for _, run in sorted(of_seed.items())]
    path.write_text("".join(f"{line}\n" for line in lines))


def _line(run: Run) -> str:
    steps = {name: [_short(record[name]) for record in run.steps] for name in METRICS if name in run.steps[0]}
    evaluations = _shortened(run.evaluations)
    return json.dumps({"strategy": run.strategy, "seed": run.seed, "steps": steps, "evaluations": evaluations})


def _shortened(records: Sequence[Record]) -> list[Record]:
    return [{name: _short(value) for name, value in record.items()} for record in records]


def _short(value: float) -> float:
    return value if isinstance(value, int) else float(f"{value:.6g}")
