"""Show samples of a run: python tools/show_samples.py RUN [--step N] [--worst | --best | --changed] [--heldout].

    python tools/show_samples.py runs/mine --step 5 --worst          # the samples of step 5 with the lowest rewards
    python tools/show_samples.py runs/mine --heldout --best -n 3     # of the newest evaluation
    python tools/show_samples.py runs/mine --heldout --changed       # prompts whose reward changed since the one before

Without --step, the newest step with samples is shown, or the newest evaluation; steps count from 0, and evaluation N is
that of the policy after N steps. Samples with equal rewards come in the order of their prompts.

--changed compares a prompt's mean reward with that at an earlier step: --against M, or the latest before --step with
the same prompt. It shows the largest changes first, up or down: for a prompt that became worse its best completion
before and its worst one now, for a prompt that became better the opposite. Every evaluation has the same prompts, so
--heldout --changed compares two evaluations. Training prompts are drawn again only in the next epoch.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_rlvr.errors import UserError
from megatron_rlvr.exit_status import EXIT_DONE, user_errors_reported
from megatron_rlvr.telemetry.samples import Row, changed_prompts, printable, prompt_text, read_samples, sampled_steps


def samples_table(rows: Sequence[Row], title: str, width: int) -> Table:
    """A row per sample."""
    table = _table(title, ("reward", "tokens", "entropy"))
    for row in rows:
        entropy = row.get("entropy")
        cells = f"{row['reward']:g}", str(row["length"]), "-" if entropy is None else f"{entropy:.3f}"
        table.add_row(*cells, *_texts(row, width), _completion(row, width))
    return table


def changes_table(run: Path, step: int, against: int | None, heldout: bool, count: int, width: int) -> Table:
    """A row per prompt whose mean reward changed.

    Raises:
        UserError: if there are no earlier samples, or none of the same prompts.
    """
    after = read_samples(run, step, heldout=heldout)
    others = [against] if against is not None else [s for s in sampled_steps(run, heldout=heldout) if s < step]
    changes = changed_prompts(after, {other: read_samples(run, other, heldout=heldout) for other in others})
    what = "evaluation" if heldout else "step"
    if not others:
        raise UserError(f"{run} has no samples of an earlier {what} than {step}: give a later --step")
    table = _table(
        f"{what} {step}: {len(changes)} prompts whose mean reward changed", ("before", "now", f"since {what}")
    )
    for change in changes[:count]:
        cells = f"{change.before:.3f}", f"{change.after:.3f}", str(change.step)
        both = Text.assemble("before: ", _completion(change.sample_before, width), "\nnow: ")
        table.add_row(*cells, *_texts(change.sample_after, width), both + _completion(change.sample_after, width))
    return table


def _table(title: str, numbers: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", show_lines=True)
    for heading in numbers:
        table.add_column(heading, justify="right")
    for heading in ("prompt", "answer", "completion"):
        table.add_column(heading, overflow="fold")
    return table


def _texts(row: Row, width: int) -> tuple[Text, Text]:
    return Text(printable(prompt_text(row.get("prompt")), width)), Text(printable(str(row.get("answer")), width))


def _completion(row: Row, width: int) -> Text:
    text = Text(printable(row["completion"], width))
    if row.get("finish_reason") == "length":
        text.append("\n(cut at the maximum length)", style="dim")
    if row.get("verifier", "ok") != "ok":
        text.append(f"\n(verifier: {printable(str(row['verifier']), 200)})", style="red")
    return text


@user_errors_reported
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_directory", type=Path)
    parser.add_argument(
        "--step", type=int, help="training step, from 0, or with --heldout the steps before an evaluation"
    )
    order = parser.add_mutually_exclusive_group()
    order.add_argument("--worst", action="store_true", help="lowest rewards first")
    order.add_argument("--best", action="store_true", help="highest rewards first")
    order.add_argument("--changed", action="store_true", help="prompts whose mean reward changed most")
    parser.add_argument("--against", type=int, metavar="M", help="with --changed: the earlier step")
    parser.add_argument("--heldout", action="store_true", help="samples of evaluations instead of training")
    parser.add_argument("-n", "--count", type=int, default=10, help="rows to show (10)")
    parser.add_argument("--width", type=int, default=400, help="characters of a text to show (400)")
    options = parser.parse_args(arguments)
    run, heldout = options.run_directory, options.heldout
    if options.count < 1 or options.width < 10:
        raise UserError("--count must be at least 1, and --width at least 10")
    if options.against is not None and not options.changed:
        raise UserError("--against needs --changed")
    steps = sampled_steps(run, heldout=heldout)
    if not steps:
        kind = "an evaluation: set data.heldout" if heldout else "a step"
        where = f"{run} has no samples of {kind}" if run.is_dir() else f"{run} is not a run directory"
        raise UserError(f"{where}; a run with telemetry.samples_every > 0 stores them in its folder samples/")
    step = steps[-1] if options.step is None else options.step
    if options.changed:
        table = changes_table(run, step, options.against, heldout, options.count, options.width)
    else:
        rows = read_samples(run, step, heldout=heldout)
        if options.worst or options.best:
            rows.sort(key=lambda row: row["reward"], reverse=options.best)
        mean = sum(row["reward"] for row in rows) / max(1, len(rows))
        title = f"{'evaluation' if heldout else 'step'} {step}: {len(rows)} samples, mean reward {mean:.3f}"
        table = samples_table(rows[: options.count], title, options.width)
    Console(highlight=False).print(table)
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
