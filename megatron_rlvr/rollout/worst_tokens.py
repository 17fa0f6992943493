"""The tokens of a step whose log-probs differ most between engine and trainer, as rows for people."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from megatron_rlvr.data.batch import RolloutBatch
from megatron_rlvr.megatron import waiting
from megatron_rlvr.megatron.parallel import Layout
from megatron_rlvr.rollout.tokenization import Tokenization
from megatron_rlvr.training.head import TokenScores
from megatron_rlvr.training.mismatch_metrics import TokenMismatch

CONTEXT = 16
"""Tokens before a token that its row shows."""


def worst_tokens(
    count: int, batch: RolloutBatch, scores: TokenScores, tokenization: Tokenization, layout: Layout
) -> list[dict[str, Any]]:
    """Return rows of the `count` tokens of largest difference on rank 0, worst first; none on other processes.

    Collective over the job: one gather, or nothing if `count` is 0.

    Args:
        count: number of tokens.
        batch: this rank's rollouts.
        scores: token scores before the updates; only those of reporting ranks are used.
        tokenization: shows tokens as text.
        layout: position of this process in the process groups.
    """
    if not count:
        return []
    rows = _rows(count, batch, scores, tokenization) if layout.is_reporting_rank else []
    gathered = waiting.gather_on_main(rows, "the tokens whose log-probs differ most")
    found = [row for of_rank in gathered or () for row in of_rank]
    return sorted(found, key=lambda row: -math.inf if row["difference"] is None else -abs(row["difference"]))[:count]


def _rows(count: int, batch: RolloutBatch, scores: TokenScores, tokenization: Tokenization) -> list[dict[str, Any]]:
    tokens = TokenMismatch.of(batch, scores)
    difference = tokens.log_ratio.abs().nan_to_num(nan=math.inf)
    sequence, rows = batch.sequence_of_token(), []
    for index in difference.topk(min(count, len(difference))).indices.tolist():
        number, position = int(sequence[index]), int(tokens.position[index])
        place = int(batch.prompt_lengths[number]) + position
        before = batch.tokens[number, max(0, place - CONTEXT) : place].tolist()
        rows.append(
            {
                "difference": _number(tokens.log_ratio[index]),
                "logprob": _number(scores.logprob[index]),
                "rollout_logprob": _number(batch.rollout_logprob[index]),
                "entropy": _number(scores.entropy[index]),
                "token": int(batch.tokens[number, place]),
                "text": tokenization.text([int(batch.tokens[number, place])]),
                "position": position,
                "length": int(batch.response_lengths[number]),
                "age": int(tokens.age[index]),
                "slot": None if batch.slots is None else int(batch.slots[number // batch.group_size]),
                "sample": number % batch.group_size,
                "before": tokenization.text(before),
            }
        )
    return rows


def _number(value: Tensor) -> float | None:
    """Return a number that JSON can hold; None if it is not finite."""
    return float(value) if math.isfinite(value) else None
