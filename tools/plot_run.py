"""Plot a run, or compare several: python tools/plot_run.py RUN_DIR... [--output DIR].

Runs whose configurations differ in the seed only are drawn as one curve, their mean, in a band from the lowest to the
highest. Exit status 2, with one line on stderr, for user errors.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console

from megatron_rlvr.errors import UserError
from megatron_rlvr.telemetry.comparison import comparison_table, group_runs
from megatron_rlvr.telemetry.plots import plot_groups
from megatron_rlvr.telemetry.summary import summary_table


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Plot a run, or compare several.")
    parser.add_argument("run_directory", nargs="+", type=Path, help="a folder that holds metrics.jsonl")
    parser.add_argument("--output", type=Path, help="folder of the PNG files (default: RUN_DIR/plots, or comparison)")
    parser.add_argument("--title", help="heading of the overview (default: the names of the runs)")
    options = parser.parse_args(arguments)
    try:
        groups = group_runs(options.run_directory)
        title = options.title or ", ".join(dict.fromkeys(group.label.split(": ")[0] for group in groups))
        alone = len(options.run_directory) == 1
        output = options.output or (options.run_directory[0] / "plots" if alone else Path("comparison"))
        if not any(run for group in groups for run in group.runs):
            raise UserError("no step is recorded yet: wait for the first step of the run, then plot")
        console = Console()
        if alone:
            console.print(summary_table(groups[0].runs[0], groups[0].evaluations[0]))
        else:
            console.print(comparison_table(groups))
        for path in plot_groups(groups, title, output):
            console.print(str(path), soft_wrap=True, highlight=False)
    except UserError as error:
        print(f"plot_run: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
