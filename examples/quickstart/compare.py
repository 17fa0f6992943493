"""Static clipping and a drawn entropy curve, side by side: ``make quickstart``.

    python examples/quickstart/compare.py [key=value ...] [--output DIR]

Trains quickstart.yaml twice at the same time and ends with one picture (the drawn curve, the entropy that followed it,
the entropy of static clipping) and one table (pass@k of both). Overrides apply to both runs. Overrides of
``algorithm.schedule`` replace the schedule of the second run: ``algorithm.schedule.name=increase-then-decrease``
compares the paper's schedule with static clipping.

The same command continues interrupted runs. User errors are one line on stderr and exit status 2.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import picture
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from megatron_rlvr.bound_to_parent import bound_command
from megatron_rlvr.errors import UserError
from megatron_rlvr.exit_status import EXIT_DONE, EXIT_STOPPED, user_errors_reported
from megatron_rlvr.log_tail import last_error
from megatron_rlvr.telemetry.metrics import METRICS_FILE, Record
from megatron_rlvr.telemetry.progress import duration, sparkline
from megatron_rlvr.telemetry.runs import load_run
from megatron_rlvr.telemetry.status import STATUS_FILE, read_status

CONFIG = Path(__file__).with_name("quickstart.yaml")
SCHEDULE = "algorithm.schedule."
STATIC = [f"{SCHEDULE}name=constant"]
# Points [fraction of the run, multiple of the initial entropy]: entropy rises above its start, then falls below it.
DRAWN = [
    f"{SCHEDULE}name=target-entropy",
    f"{SCHEDULE}curve=piecewise",
    f"{SCHEDULE}points=[[0,1],[0.125,1.1],[0.5,0.65],[0.85,0.55],[1,0.55]]",
]
# Many prompts with few samples each, and small updates: with as many completions as in quickstart.yaml, the entropy
# varies less from step to step, and stays closer to the curve.
STEADY = ["rollout.prompts_per_step=256", "rollout.samples_per_prompt=4", "optimizer.learning_rate=1e-4"]
POLL_SECONDS = 0.5


@dataclass
class Run:
    """One of the two training runs: its directory, its configuration and overrides of it, and its process."""

    name: str
    directory: Path
    overrides: list[str]
    config: Path = CONFIG
    process: subprocess.Popen[bytes] | None = None

    @property
    def log(self) -> Path:
        return self.directory.with_suffix(".log")

    def start(self) -> None:
        """Start training. The process ends with this one, however this one ends."""
        self.directory.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "megatron_rlvr.train", str(self.config)]
        command += [*self.overrides, f"name={self.name}", f"run_directory={self.directory}"]
        with self.log.open("ab") as log:
            # In a session of its own, so that Ctrl-C reaches it once: as the SIGTERM of `stop`.
            self.process = subprocess.Popen(
                bound_command(command, os.getpid()), stdout=log, stderr=log, start_new_session=True
            )

    def stop(self) -> None:
        """Ask the training process to write a checkpoint and end, and wait for it."""
        if self.process is not None:
            if self.process.poll() is None:
                self.process.send_signal(signal.SIGTERM)
            self.process.wait()

    def status(self) -> int | None:
        """The exit status of training, None while it runs."""
        return None if self.process is None else self.process.poll()

    def records(self) -> list[Record]:
        """The metrics of the finished steps."""
        return load_run(self.directory)[0] if (self.directory / METRICS_FILE).is_file() else []


def runs(overrides: Sequence[str], output: Path) -> list[Run]:
    """The two runs: static clipping, and the drawn curve or the schedule that `overrides` choose.

    Raises:
        UserError: if `overrides` name or place a run, which would give both the same directory.
    """
    refuse_places(overrides)
    schedule = [word for word in overrides if word.startswith(SCHEDULE)]
    common = [word for word in overrides if not word.startswith(SCHEDULE)]
    # The machine is shared by two processes. More than two threads do not make this small model faster.
    common = [f"threads={min(max((os.cpu_count() or 1) // 2, 1), 2)}", *STEADY, *common]
    names = [word.partition("=")[2] for word in schedule if word.startswith(f"{SCHEDULE}name=")]
    second = names[-1] if names else "drawn-curve"
    return [
        Run("static-clipping", output / "static-clipping", common + STATIC),
        Run(second, output / second, common + (schedule or DRAWN)),
    ]


def refuse_places(overrides: Sequence[str]) -> None:
    """Raise UserError if `overrides` name or place a run."""
    for word in overrides:
        if word.partition("=")[0] in ("name", "run_directory"):
            raise UserError(f"{word}: the two runs have names and directories of their own; choose --output DIR")


def train_to_the_end(both: Sequence[Run], console: Console) -> bool:
    """Train both runs; returns whether they ended, and says how to continue if they were stopped.

    Raises:
        UserError: if one of them fails.
    """
    try:
        train(both, console)
    except KeyboardInterrupt:
        console.print("stopped; the same command continues both runs")
        return False
    if any(run.status() == EXIT_STOPPED for run in both):
        console.print("a run was stopped; the same command continues both runs")
        return False
    return True


def train(both: Sequence[Run], console: Console) -> None:
    """Train both runs to their end.

    Raises:
        UserError: if one of them fails. The other one is then stopped with a checkpoint.
    """
    try:
        for run in both:
            run.start()
        if console.is_terminal and not console.is_dumb_terminal:
            with Live(_panel(both), console=console, auto_refresh=False) as live:
                while _running(both):
                    time.sleep(POLL_SECONDS)
                    live.update(_panel(both), refresh=True)
        else:
            _print_steps(both, console)
        failed = [run for run in both if run.status() not in (None, EXIT_DONE, EXIT_STOPPED)]
    finally:
        for run in both:
            run.stop()
    for run in failed:
        raise UserError(f"{run.name}: {last_error(run.log).removeprefix('error: ')} (log: {run.log})")


def _running(both: Sequence[Run]) -> bool:
    """Whether a run still trains and none has failed."""
    statuses = [run.status() for run in both]
    return None in statuses and all(status in (None, EXIT_DONE) for status in statuses)


def _print_steps(both: Sequence[Run], console: Console) -> None:
    """Print a line per finished step until the runs end, for logs and pipes."""
    printed = {run.name: 0 for run in both}
    running = True
    while running:
        time.sleep(POLL_SECONDS)
        running = _running(both)
        for run in both:
            records = run.records()
            for record in records[printed[run.name] :]:
                drawn = f" (drawn {record['control/target']:.3f})" if "control/target" in record else ""
                line = f"step {record['step'] + 1:3d}  reward {record['reward']:.3f}  entropy {record['entropy']:.3f}"
                console.print(f"{run.name:15}  {line}{drawn}", soft_wrap=True, highlight=False, markup=False)
            printed[run.name] = len(records)


def _panel(both: Sequence[Run]) -> Table:
    """The progress of both runs: entropy and reward as lines of blocks, and the time left."""
    table = Table.grid(padding=(0, 2))
    for run in both:
        records = run.records()
        status = read_status(run.directory) if (run.directory / STATUS_FILE).is_file() else None
        done = f"step {len(records)}/{status.steps}" if status else "starting"
        left = f"{duration(status.seconds_left)} left" if status and status.seconds_left is not None else ""
        table.add_row(Text(run.name, style="bold"), done, left)
        for name, style in (("entropy", "magenta"), ("reward", "green")):
            values = [record[name] for record in records if name in record]
            latest = f"{values[-1]:.3f}" if values else "-"
            table.add_row(Text(f"  {name}", style="dim"), latest, Text(sparkline(values), style=style))
    return table


def report(both: Sequence[Run], path: Path, console: Console) -> None:
    """Save the picture, and print the table and what to look at next."""
    static, controlled = (run.records() for run in both)
    picture.draw(static, controlled, both[1].name.replace("-", " "), path)
    console.print(picture.results_table([run.name for run in both], [load_run(run.directory)[1] for run in both]))
    print_distance(controlled, path, console)
    for run in both:
        console.print(f"run      {run.directory}", soft_wrap=True, highlight=False, markup=False)


def print_distance(controlled: Sequence[Record], path: Path, console: Console) -> None:
    """Print how far the entropy of the controlled run was from its curve, and where the picture is."""
    if (error := picture.largest_error(controlled, len(controlled))) is not None:
        console.print(f"Entropy stayed within {error:.1%} of the drawn curve after the first tenth of the steps.")
    console.print(f"picture  {path}", soft_wrap=True, highlight=False, markup=False)


@user_errors_reported
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Static clipping and a drawn entropy curve, side by side.")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of quickstart.yaml")
    parser.add_argument("--output", type=Path, default=Path("runs/quickstart"), help="folder of the two runs")
    options = parser.parse_args(arguments)
    both, console = runs(options.overrides, options.output), Console()
    if not train_to_the_end(both, console):
        return EXIT_STOPPED
    report(both, options.output / "comparison.png", console)
    return EXIT_DONE


def interruptible() -> None:
    """Let SIGINT and SIGTERM interrupt this program, also one that a shell started in the background."""
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell starts background programs with SIGINT ignored
        signal.signal(number, signal.default_int_handler)


if __name__ == "__main__":
    interruptible()
    sys.exit(main())
