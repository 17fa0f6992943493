"""Rollouts on disk, one JSON line per completion, for users to read and for the replay engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_rlvr.data.completion import Completion
from megatron_rlvr.errors import UserError
from megatron_rlvr.rollout.groups import Group


def recording_path(folder: Path, step: int, slot: int) -> Path:
    """Return the path of a group's file; `slot` is the place of the group in the step."""
    return folder / f"step_{step:06d}" / f"prompt_{slot:05d}.jsonl"


def record_group(folder: Path, step: int, group: Group, prompt: Any) -> None:
    """Write the file of a group: the prompt, and the text, reward, tokens and log-probs of each completion."""
    path = recording_path(folder, step, group.slot)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    for completion, text, verdict in zip(group.completions, group.texts, group.verdicts, strict=True):
        row = {
            "prompt": prompt,
            "completion": text,
            "reward": verdict.reward,
            "finish_reason": completion.finish_reason,
            "token_ids": completion.token_ids,
            "logprobs": completion.logprobs,
            "weight_version": completion.weight_version,
        }
        if completion.version_spans:
            row["version_spans"] = completion.version_spans
        lines.append(json.dumps(row))
    path.write_text("\n".join(lines) + "\n")


def read_recorded_group(folder: Path, step: int, slot: int, samples: int) -> list[Completion]:
    """Read the completions of a group that `record_group` wrote.

    Raises:
        UserError: if the file is missing or does not hold `samples` completions.
    """
    path = recording_path(folder, step, slot)
    if not path.is_file():
        raise UserError(f"no recorded rollout {path}: record a run with rollout.record=true and the same settings")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    if len(rows) != samples:
        raise UserError(
            f"{path} holds {len(rows)} completions, rollout.samples_per_prompt asks for {samples}: set it to "
            f"{len(rows)}"
        )
    return [
        Completion(
            token_ids=row["token_ids"],
            logprobs=row["logprobs"],
            finish_reason=row["finish_reason"],
            weight_version=row["weight_version"],
            version_spans=tuple((version, tokens) for version, tokens in row.get("version_spans", [])),
        )
        for row in rows
    ]
