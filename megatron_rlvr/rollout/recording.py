"""Rollouts on disk: one JSON line a completion, to be read by people and replayed by the ``recorded`` engine."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_rlvr.data.completion import Completion
from megatron_rlvr.errors import UserError


def recording_path(folder: Path, step: int, slot: int) -> Path:
    """The file of one prompt of a step; `slot` is the prompt's place among all the prompts of the step."""
    return folder / f"step_{step:06d}" / f"prompt_{slot:05d}.jsonl"


def record(
    folder: Path,
    step: int,
    slots: Sequence[int],
    prompts: Sequence[Any],
    completions: Sequence[Completion],
    texts: Sequence[str],
    rewards: Sequence[float],
) -> None:
    """Write the group of every prompt: its text, and each completion's text, reward, tokens and log-probs."""
    group = len(completions) // len(slots)
    for g, (slot, prompt) in enumerate(zip(slots, prompts, strict=True)):
        path = recording_path(folder, step, slot)
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = []
        for i in range(g * group, (g + 1) * group):
            c = completions[i]
            row = {"prompt": prompt, "completion": texts[i], "reward": rewards[i], "finish_reason": c.finish_reason}
            row |= {"token_ids": c.token_ids, "logprobs": c.logprobs, "weight_version": c.weight_version}
            if c.version_spans:
                row["version_spans"] = c.version_spans
            lines.append(json.dumps(row))
        path.write_text("\n".join(lines) + "\n")


def replay(folder: Path, step: int, slots: Sequence[int], samples: int) -> list[Completion]:
    """Read back what `record` wrote for these slots of a step.

    Raises:
        UserError: when a file is missing or holds another number of completions.
    """
    completions: list[Completion] = []
    for slot in slots:
        path = recording_path(folder, step, slot)
        if not path.is_file():
            raise UserError(f"no recorded rollout {path}: record a run with rollout.record=true and the same settings")
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        if len(rows) != samples:
            raise UserError(f"{path} holds {len(rows)} completions, rollout.samples_per_prompt asks for {samples}")
        for row in rows:
            spans = tuple((version, tokens) for version, tokens in row.get("version_spans", []))
            values = row["token_ids"], row["logprobs"], row["finish_reason"], row["weight_version"]
            completions.append(Completion(*values, spans))
    return completions
