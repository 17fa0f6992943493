"""The quickstart on several seeds, one after the other, and a table of its results: ``make quickstart-seeds``.

    python examples/quickstart/seeds.py [--seeds 0 1 2] [key=value ...] [--output DIR]

Every seed is a run of compare.py in DIR/seed-N. The table, also in DIR/seeds.md, has for every seed the largest
distance of a step's entropy from the drawn curve after the first tenth of the steps, and pass@k of both runs. The same
command continues interrupted runs and measures finished ones again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import compare
import picture

from megatron_rlvr.atomic_write import write_text
from megatron_rlvr.errors import UserError
from megatron_rlvr.exit_status import EXIT_DONE, user_errors_reported
from megatron_rlvr.telemetry.runs import load_run

PASS_AT = ("pass@1", "pass@8", "pass@16")


def row(seed: int, both: Sequence[compare.Run]) -> str:
    """Return the row of a seed in Markdown.

    Raises:
        UserError: if a run has not ended, or was not evaluated with enough samples.
    """
    (_, static), (records, controlled) = (load_run(run.directory) for run in both)
    error = picture.largest_error(records, len(records))
    try:
        cells = [f"{static[-1][name]:.3f} → {controlled[-1][name]:.3f}" for name in PASS_AT]
    except KeyError as missing:
        raise UserError(f"seed {seed} has no {missing.args[0]}: use evaluation.samples=16 or more") from missing
    return f"| {seed} | {'-' if error is None else f'{error:.1%}'.replace('%', ' %')} | {' | '.join(cells)} |"


def table(rows: Sequence[str]) -> str:
    """Return the table of all seeds in Markdown."""
    heading = "| seed | largest distance from the curve | " + " | ".join(PASS_AT) + " |"
    return "\n".join([heading, "| --- |" + " --- |" * (1 + len(PASS_AT)), *rows]) + "\n"


@user_errors_reported
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="The quickstart on several seeds, and a table of its results.")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of both runs of every seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds; 0 1 2 by default")
    parser.add_argument("--output", type=Path, default=Path("runs/quickstart/seeds"), help="folder of all runs")
    options = parser.parse_args(arguments)
    if named := [word for word in options.overrides if word.partition("=")[0] == "seed"]:
        raise UserError(f"{named[0]}: seeds are given by --seeds")
    rows = []
    for seed in options.seeds:
        overrides, folder = [*options.overrides, f"seed={seed}"], options.output / f"seed-{seed}"
        if (status := compare.main([*overrides, "--output", str(folder)])) != EXIT_DONE:
            return status
        rows.append(row(seed, compare.runs(overrides, folder)))
    write_text(options.output / "seeds.md", table(rows))
    print(table(rows), end="")
    return EXIT_DONE


if __name__ == "__main__":
    compare.interruptible()
    sys.exit(main())
