"""Show the status of runs: python tools/status.py RUN_DIR... [--watch SECONDS].

Prints one line per run: finished steps, reward, entropy and its target, tokens per second, remaining time, the newest
checkpoint, the age of this information, and the last event of the Slurm job. Exit status 2 when no directory holds a
run; with `--watch` the tool waits for one.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from megatron_rlvr.errors import UserError
from megatron_rlvr.exit_status import EXIT_DONE, user_errors_reported
from megatron_rlvr.telemetry.progress import DASH, duration
from megatron_rlvr.telemetry.status import STATUS_FILE, Status, read_status

# A run whose status is older than this many seconds plus this many of its steps has probably died.
SILENT_SECONDS, SILENT_STEPS = 120, 5
HEADINGS = ("run", "state", "step", "reward", "entropy", "target", "tokens/s", "left", "checkpoint", "updated", "")


def row(directory: Path, now: float) -> list[str]:
    """The cells of one run.

    Raises:
        UserError: when the directory holds neither a status nor the history of a Slurm job.
    """
    history = directory / "slurm" / "history"
    lines = history.read_text(errors="replace").splitlines() if history.is_file() else []
    note = lines[-1] if lines else ""
    try:
        status = read_status(directory)
    except UserError:
        if not lines:
            raise
        return [str(directory), "waiting", *[DASH] * (len(HEADINGS) - 3), note]
    age = now - status.updated
    return [
        str(directory),
        state(status, age),
        f"{status.step}/{status.steps}",
        number(status.reward),
        number(status.entropy),
        number(status.entropy_target),
        number(status.tokens_per_second, ".0f"),
        DASH if status.seconds_left is None else duration(status.seconds_left),
        DASH if status.checkpoint is None else f"step_{status.checkpoint}",
        f"{duration(age)} ago",
        "; ".join(text for text in (status.reason, note) if text),
    ]


def state(status: Status, age: float) -> str:
    """The phase of a running run, or how it ended; ``silent`` when its status is older than it should be."""
    if status.state != "running":
        return status.state
    if age > SILENT_SECONDS + SILENT_STEPS * (status.step_seconds or 0.0):
        return "silent"
    return status.phase


def number(value: float | None, form: str = ".3f") -> str:
    return DASH if value is None else format(value, form)


def table(directories: Sequence[Path], waiting: bool = False) -> str:
    """All runs as a table, one line per run. Unless `waiting`, at least one directory must hold a run.

    Raises:
        UserError: when none does.
    """
    rows, errors = [list(HEADINGS)], []
    for directory in directories:
        try:
            rows.append(row(directory, time.time()))
        except UserError as error:
            errors.append(error)
            note = str(error) if (directory / STATUS_FILE).exists() else ""
            rows.append([str(directory), "no run", *[DASH] * (len(HEADINGS) - 3), note])
    if errors and len(errors) == len(directories) and not waiting:
        raise errors[0]
    widths = [max(len(cells[column]) for cells in rows) for column in range(len(HEADINGS))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(cells, widths, strict=True)).rstrip() for cells in rows)


@user_errors_reported
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Show the status of runs.")
    parser.add_argument("run_directory", nargs="+", type=Path)
    parser.add_argument("--watch", type=float, metavar="SECONDS", help="show again after this time, until interrupted")
    options = parser.parse_args(arguments)
    try:
        print(table(options.run_directory, bool(options.watch)), flush=True)
        while options.watch:
            time.sleep(options.watch)
            print("\033[H\033[2J" + table(options.run_directory, waiting=True), flush=True)
    except KeyboardInterrupt:
        pass
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
