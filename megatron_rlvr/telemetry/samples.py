"""Samples of a run on disk: one JSONL file per step or evaluation, with one line per completion."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_rlvr.atomic_write import write_text
from megatron_rlvr.checked_input import InvalidInputError, field, parse_object, read_bytes
from megatron_rlvr.errors import UserError, truncated

Row = dict[str, Any]
LARGEST_FILE = 2**32
"""Maximum size of the file of a step, in bytes."""
_NAME = re.compile(r"(evaluation|step)_([0-9]{6,15})\.jsonl")


def samples_path(run: Path, step: int, *, heldout: bool = False) -> Path:
    """Return the file of a training step, or of the evaluation after `step` steps."""
    return run / "samples" / f"{'evaluation' if heldout else 'step'}_{step:06d}.jsonl"


def write_samples(run: Path, step: int, rows: Sequence[Row], *, heldout: bool = False) -> None:
    """Write the samples of a step or of an evaluation; replaces those of an interrupted process."""
    _write(samples_path(run, step, heldout=heldout), rows)


def write_worst_tokens(run: Path, step: int, rows: Sequence[Row]) -> None:
    """Write the tokens of a step whose log-probs differ most between engine and trainer."""
    _write(run / "mismatch" / f"step_{step:06d}.jsonl", rows)


def remove_samples(run: Path, first_step: int) -> None:
    """Remove the samples of `first_step` and later steps, and evaluations of later policies: they are made again."""
    for path in [*(run / "samples").glob("*.jsonl"), *(run / "mismatch").glob("*.jsonl")]:
        match = _NAME.fullmatch(path.name)
        if match and int(match[2]) >= first_step + (match[1] == "evaluation"):
            path.unlink()


def _write(path: Path, rows: Sequence[Row]) -> None:
    path.parent.mkdir(exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
    write_text(path, text.encode("utf-8", "replace").decode())  # an answer may hold half of a surrogate pair


def sampled_steps(run: Path, *, heldout: bool = False) -> list[int]:
    """Return the steps whose samples a run has stored, in order."""
    matches = [_NAME.fullmatch(path.name) for path in (run / "samples").glob("*.jsonl")]
    kind = "evaluation" if heldout else "step"
    return sorted(int(match[2]) for match in matches if match and match[1] == kind)


def read_samples(run: Path, step: int, *, heldout: bool = False) -> list[Row]:
    """Read the samples of a step or of an evaluation.

    Raises:
        UserError: if there are none, or the file is damaged.
    """
    path = samples_path(run, step, heldout=heldout)
    steps = sampled_steps(run, heldout=heldout)
    if step not in steps:
        what = "evaluation" if heldout else "step"
        known = f"{what}s with samples: {shortened(steps)}" if steps else f"no {what} has samples"
        raise UserError(f"{run} has no samples of {what} {step}; {known}; see telemetry.samples_every")
    rows: list[Row] = []
    try:
        for line in read_bytes(path, LARGEST_FILE).splitlines():
            row = parse_object(line)
            for key, kind in (("completion", str), ("reward", float), ("length", int), ("example", int)):
                field(row, key, kind)
            if row.get("entropy") is not None:
                field(row, "entropy", float)
            rows.append(row)
    except InvalidInputError as error:
        raise UserError(f"{path} line {len(rows) + 1}: {error}: remove the line, or the file") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    return rows


def shortened(steps: Sequence[int]) -> str:
    """Return steps as text, with those in the middle left out if there are many."""
    shown = [str(step) for step in steps]
    return ", ".join(shown if len(shown) <= 12 else [*shown[:5], "...", *shown[-5:]])


def three_of(rows: Sequence[Row]) -> list[Row]:
    """Return the sample with the highest, one with the median, and one with the lowest reward, if there are three."""
    ordered = sorted((row for row in rows if math.isfinite(row["reward"])), key=lambda row: -row["reward"])
    return ordered if len(ordered) < 3 else [ordered[0], ordered[len(ordered) // 2], ordered[-1]]


def prompt_text(prompt: Any) -> str:
    """Return a prompt as text: of chat messages, the content of the last one."""
    if isinstance(prompt, list) and prompt and isinstance(prompt[-1], dict):
        return str(prompt[-1].get("content", ""))
    return str(prompt)


def printable(text: str, width: int) -> str:
    """Return a text of at most `width` characters, without control characters, which could change a terminal."""
    clean = "".join(c if c.isprintable() or c == "\n" else " " if c.isspace() else "\ufffd" for c in text[: width + 1])
    return truncated(clean, width)


def one_line(text: str, width: int) -> str:
    """Return a text on one line of at most `width` characters, without control characters."""
    return printable(" ".join(text.split()), width)


@dataclass(frozen=True)
class ChangedPrompt:
    """A prompt whose mean reward differs between two steps.

    Attributes:
        step: the earlier step.
        before, after: mean rewards.
        sample_before, sample_after: the samples that show the change best: the highest reward before and the lowest
            after if rewards fell, and the other way round if they rose.
    """

    step: int
    before: float
    after: float
    sample_before: Row
    sample_after: Row


def changed_prompts(after: Sequence[Row], earlier: Mapping[int, Sequence[Row]]) -> list[ChangedPrompt]:
    """Return the prompts whose mean reward changed, the largest change first.

    Args:
        after: samples of the later step.
        earlier: samples of earlier steps. A prompt is compared with the latest of them that has it.
    """
    before: dict[str, tuple[int, list[Row]]] = {}
    for step in sorted(earlier):
        before |= {prompt: (step, rows) for prompt, rows in _by_prompt(earlier[step]).items()}
    changes = []
    for prompt, rows in _by_prompt(after).items():
        if prompt not in before:
            continue
        step, old = before[prompt]
        means = [math.fsum(row["reward"] for row in group) / len(group) for group in (old, rows)]
        if means[0] == means[1]:
            continue
        first, second = (min, max) if means[1] > means[0] else (max, min)
        samples = first(old, key=_reward), second(rows, key=_reward)
        changes.append(ChangedPrompt(step, means[0], means[1], *samples))
    return sorted(changes, key=lambda change: -abs(change.after - change.before))


def _by_prompt(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Group samples by their prompt and answer, which identify a problem even if the data file has changed."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(json.dumps([row.get("prompt"), row.get("answer")], sort_keys=True), []).append(row)
    return groups


def _reward(row: Row) -> float:
    return row["reward"]
