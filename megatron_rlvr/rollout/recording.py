"""Rollouts on disk, one JSON line per completion, for users to read and for the replay engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_rlvr.checked_input import InvalidInputError, checked, field, parse_object, read_bytes
from megatron_rlvr.data.completion import Completion, checked_completion
from megatron_rlvr.data.routes import decoded_routes
from megatron_rlvr.errors import UserError
from megatron_rlvr.rollout.groups import Group
from megatron_rlvr.rollout.sampling import SamplingSettings

LARGEST_FILE = 2**30
"""Maximum size of the file of a group, in bytes."""


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
        if completion.kept is not None:
            row["kept"] = completion.kept.sets()
        if completion.routes is not None:
            row["routes"] = completion.routes.encoded()
        lines.append(json.dumps(row))
    path.write_text("\n".join(lines) + "\n")


def read_recorded_group(
    folder: Path, step: int, slot: int, sampling: SamplingSettings, prompt_tokens: int = 0
) -> list[Completion]:
    """Read the completions of a group that `record_group` wrote.

    Args:
        folder, step, slot: see `recording_path`.
        sampling: number and maximum length of the completions, and the routers whose routes to read, if any.
        prompt_tokens: length of the prompt, which routes include.

    Raises:
        UserError: if the file is missing or damaged, or does not hold the completions that `sampling` asks for.
    """
    path = recording_path(folder, step, slot)
    if not path.is_file():
        raise UserError(f"no recorded rollout {path}: record a run with rollout.record=true and the same settings")
    try:
        rows = [parse_object(line) for line in read_bytes(path, LARGEST_FILE).splitlines()]
        if sampling.routers is not None and not all("routes" in row for row in rows):
            raise UserError(
                f"{path} was recorded without rollout.routing_replay, which needs the routes of its tokens: record it "
                "again with rollout.routing_replay=true, or set it to false"
            )
        completions = [_completion(row, sampling, prompt_tokens) for row in rows]
    except (OSError, InvalidInputError) as error:
        raise UserError(
            f"{path} is not a recorded rollout ({error}): record it again with rollout.record=true"
        ) from error
    if len(rows) != sampling.samples:
        raise UserError(
            f"{path} holds {len(rows)} completions, rollout.samples_per_prompt asks for {sampling.samples}: set it to "
            f"{len(rows)}"
        )
    return completions


def _completion(row: dict[str, Any], sampling: SamplingSettings, prompt_tokens: int) -> Completion:
    routes = None
    if sampling.routers is not None:
        length = prompt_tokens + len(field(row, "token_ids", list))
        routes = decoded_routes(row["routes"], length - 1, sampling.routers, of_server=False)
    spans = field(row, "version_spans", list, default=[])
    if not all(isinstance(span, list) and len(span) == 2 for span in spans):
        raise InvalidInputError("'version_spans' has entries that are not [version, tokens]")
    return checked_completion(
        token_ids=row.get("token_ids"),
        logprobs=row.get("logprobs"),
        finish_reason=row.get("finish_reason"),
        weight_version=field(row, "weight_version", int, at_least=-1, at_most=2**53),
        spans=[
            (
                checked(version, int, "version", at_least=-1, at_most=2**53),
                checked(tokens, int, "tokens", at_least=1, at_most=2**31),
            )
            for version, tokens in spans
        ],
        max_tokens=sampling.max_tokens,
        kept=row.get("kept"),
        routes=routes,
    )
