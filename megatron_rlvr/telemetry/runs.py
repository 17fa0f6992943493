"""The records of finished or running runs, loaded from their directories."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from megatron_rlvr.telemetry.metrics import EVALUATIONS_FILE, Record, read_metrics


@dataclass
class RunGroup:
    """Runs that differ only in their seed: a label, and the metrics and evaluation records of each run."""

    label: str
    runs: list[list[Record]]
    evaluations: list[list[Record]] = field(default_factory=list)


def load_run(run_directory: str | os.PathLike[str]) -> tuple[list[Record], list[Record]]:
    """The metrics and the evaluation records of a run. Raises UserError when the directory holds no metrics."""
    evaluations = Path(run_directory) / EVALUATIONS_FILE
    return read_metrics(run_directory), read_metrics(evaluations) if evaluations.is_file() else []
