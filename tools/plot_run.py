"""Plot a run, or compare several: python tools/plot_run.py RUN_DIR... [--output DIR].

Runs whose configurations differ only in the seed are drawn as one curve, their mean, with a band from the lowest to the
highest run. User errors are one line on stderr and exit status 2.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from megatron_rlvr.errors import UserError
from megatron_rlvr.exit_status import EXIT_DONE, user_errors_reported
from megatron_rlvr.telemetry.comparison import comparison_table, group_runs
from megatron_rlvr.telemetry.plots import plot_groups
from megatron_rlvr.telemetry.summary import summary_table


@user_errors_reported
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Plot a run, or compare several.")
    parser.add_argument("run_directory", nargs="+", type=Path, help="a folder that holds metrics.jsonl")
    parser.add_argument("--output", type=Path, help="folder of the files (default: RUN_DIR/plots, or comparison)")
    parser.add_argument("--format", choices=("png", "pdf", "svg"), default="png", help="type of the files (png)")
    parser.add_argument("--smooth", type=int, default=1, metavar="N", help="draw the mean over the latest N steps (1)")
    parser.add_argument("--title", help="heading of the overview (default: the names of the runs)")
    options = parser.parse_args(arguments)
    if options.smooth < 1:
        raise UserError(f"--smooth must be at least 1, found {options.smooth}")
    groups = group_runs(options.run_directory)
    title = options.title or ", ".join(dict.fromkeys(group.label.split(": ")[0] for group in groups))
    single = len(options.run_directory) == 1
    output = options.output or (options.run_directory[0] / "plots" if single else Path("comparison"))
    if not any(run for group in groups for run in group.runs):
        raise UserError("no step is recorded yet: plot after the first step of the run")
    console = Console()
    if single:
        console.print(summary_table(groups[0].runs[0], groups[0].evaluations[0]))
    else:
        console.print(comparison_table(groups))
    for path in plot_groups(groups, title, output, options.format, options.smooth):
        console.print(str(path), soft_wrap=True, highlight=False)
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
