"""The archive of finished runs, kept in the repository so that runs of different machines and days add up.

One JSON line per run: the metrics of every step that the report needs, and all evaluations. Numbers are rounded to six
significant digits.
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
    """The runs of an archive; none if the file does not exist."""
    runs: Runs = {}
    if path.is_file():
        for line in path.read_text().splitlines():
            row = json.loads(line)
            columns: dict[str, list[float]] = row["steps"]
            steps = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
            run = Run(row["strategy"], row["seed"], steps, row["evaluations"])
            runs.setdefault(run.strategy, {})[run.seed] = run
    return runs


def write(path: Path, runs: Runs, metrics: Sequence[str] = METRICS) -> None:
    """Write ``runs``, ordered by strategy and seed, with those of ``metrics`` that they recorded."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [_line(run, metrics) for _, of_seed in sorted(runs.items()) for _, run in sorted(of_seed.items())]
    path.write_text("".join(f"{line}\n" for line in lines))


def _line(run: Run, metrics: Sequence[str]) -> str:
    steps = {name: [_rounded(record[name]) for record in run.steps] for name in metrics if name in run.steps[0]}
    evaluations = _rounded_records(run.evaluations)
    return json.dumps({"strategy": run.strategy, "seed": run.seed, "steps": steps, "evaluations": evaluations})


def _rounded_records(records: Sequence[Record]) -> list[Record]:
    return [{name: _rounded(value) for name, value in record.items()} for record in records]


def _rounded(value: float) -> float:
    return value if isinstance(value, int) else float(f"{value:.6g}")
