"""Entropy control on a real language model, in one picture: ``make real-model``.

    python examples/real_model/show.py [key=value ...] [--output DIR]

Trains Gemma 3 270M as real_model.yaml says, under static clipping and under target entropy at the same time, one thread
each. It ends with one picture (the drawn curve, the entropy that followed it, the entropy of static clipping, and the
reward of both) and one table (held-out pass@k and distinct right answers). Overrides apply to both runs, except that
those of ``algorithm.schedule`` apply to the second one.

The same command continues interrupted runs. User errors are one line on stderr and exit status 2.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from compare import (  # examples/quickstart
    SCHEDULE,
    STATIC,
    Run,
    interruptible,
    print_distance,
    refuse_places,
    train_to_the_end,
)
from figure import NAMES, draw, results_table
from rich.console import Console

from megatron_rlvr.exit_status import EXIT_DONE, EXIT_STOPPED, user_errors_reported
from megatron_rlvr.telemetry.runs import load_run

CONFIG = Path(__file__).with_name("real_model.yaml")


def runs(overrides: Sequence[str], output: Path) -> list[Run]:
    """Return the two runs.

    Raises:
        UserError: if `overrides` name or place a run, which would give both the same directory.
    """
    refuse_places(overrides)
    common = ["threads=1", *(word for word in overrides if not word.startswith(SCHEDULE))]
    schedules = [STATIC, [word for word in overrides if word.startswith(SCHEDULE)]]
    return [
        Run(name, output / name, common + schedule, CONFIG) for name, schedule in zip(NAMES, schedules, strict=True)
    ]


@user_errors_reported
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Static clipping and a drawn entropy curve on Gemma 3 270M.")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of real_model.yaml")
    parser.add_argument("--output", type=Path, default=Path("runs/real_model"), help="folder of the two runs")
    options = parser.parse_args(arguments)
    both, console = runs(options.overrides, options.output), Console()
    if not train_to_the_end(both, console):
        return EXIT_STOPPED
    finished = [load_run(run.directory) for run in both]
    path = options.output / "real_model.png"
    draw({name: [steps] for name, (steps, _) in zip(NAMES, finished, strict=True)}, path)
    console.print(results_table([evaluations for _, evaluations in finished]))
    print_distance(finished[1][0], path, console)
    return EXIT_DONE


if __name__ == "__main__":
    interruptible()
    sys.exit(main())
