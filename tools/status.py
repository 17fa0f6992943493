"""How runs are doing: python tools/status.py RUN_DIR... [--watch SECONDS].

One line a run: finished steps, reward, entropy against its target, tokens a second, time to the end, the newest
checkpoint, how long ago the run said so, and what became of its Slurm job. Exit status 2 when no directory holds a run;
`--watch` waits for one.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from megatron_rlvr.errors import UserError
from megatron_rlvr.telemetry.progress import DASH, duration
from megatron_rlvr.telemetry.status import STATUS_FILE, Status, read_status

# A run that says nothing for this many of its steps, and so many seconds, has probably died.
SILENT_STEPS, SILENT_SECONDS = 5, 120
HEADINGS = ("run", "state", "step", "reward", "entropy", "target", "tokens/s", "left", "checkpoint", "updated", "")


def row(directory: Path, now: float) -> list[str]:
    """The cells of one run.

    Raises:
        UserError: when the directory holds neither a status nor the record of a Slurm job.
    """
    history = directory / "slurm" / "history"
    lines = history.read_text().splitlines() if history.is_file() else []
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
    """``running`` with its phase, or how the run ended; ``silent`` when it should have spoken."""
    if status.state != "running":
        return status.state
    if age > SILENT_SECONDS + SILENT_STEPS * (status.step_seconds or 0.0):
        return "silent"
    return status.phase


def number(value: float | None, form: str = ".3f") -> str:
    return DASH if value is None else format(value, form)


def table(directories: Sequence[Path], waiting: bool = False) -> str:
    """All runs, in columns.

    Raises:
        UserError: when there is none in any of the directories, and it is not waited for.
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


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns its exit status."""
    parser = argparse.ArgumentParser(description="How runs are doing.")
    parser.add_argument("run_directory", nargs="+", type=Path)
    parser.add_argument("--watch", type=float, metavar="SECONDS", help="show again so often, until interrupted")
    options = parser.parse_args(arguments)
    try:
        print(table(options.run_directory, bool(options.watch)), flush=True)
        while options.watch:
            time.sleep(options.watch)
            print("\033[H\033[2J" + table(options.run_directory, waiting=True), flush=True)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
