"""The samples of a step as rows for people to read, collected from all data-parallel ranks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from megatron_rlvr.data.batch import RolloutBatch
from megatron_rlvr.data.completion import Completion
from megatron_rlvr.data.examples import Example
from megatron_rlvr.megatron import waiting
from megatron_rlvr.megatron.parallel import Layout
from megatron_rlvr.rollout.groups import Group
from megatron_rlvr.rollout.prompts import PromptSet
from megatron_rlvr.verifiers import Verdict

Row = dict[str, Any]


def rows_of_groups(groups: Iterable[Group], prompts: PromptSet) -> list[Row]:
    """Return the rows of a rollout, in the order of its sequences; `collected` adds their entropy."""
    return [
        row
        for group in groups
        for row in rows_of_prompt(
            group.slot, prompts.examples[group.example], group.completions, group.texts, group.verdicts
        )
    ]


def rows_of_prompt(
    slot: int, example: Example, completions: list[Completion], texts: list[str], verdicts: list[Verdict]
) -> list[Row]:
    """Return a row per completion of a prompt. `slot` is the place of the prompt in the step or the evaluation."""
    return [
        {
            "prompt": example.prompt,
            "answer": example.answer,
            "completion": text,
            "reward": verdict.reward,
            "length": len(completion.token_ids),
            "entropy": None,
            "finish_reason": completion.finish_reason,
            "weight_version": completion.weight_version,
            "verifier": verdict.status if verdict.status == "ok" else f"{verdict.status}: {verdict.detail}",
            "source": example.source,
            "example": example.index,
            "slot": slot,
            "sample": sample,
        }
        for sample, (completion, text, verdict) in enumerate(zip(completions, texts, verdicts, strict=True))
    ]


def collected(
    rows: list[Row], layout: Layout, batch: RolloutBatch | None = None, entropy: Tensor | None = None
) -> list[Row]:
    """Return the rows of all data-parallel ranks on rank 0, in the order of slots; none on other processes.

    Collective over the job: one gather.

    Args:
        rows: the rows of this data-parallel rank; only those of its leader are used.
        layout: position of this process in the process groups.
        batch: the rollout of this data-parallel rank, if `entropy` is given.
        entropy: float32 [T], entropy of each response token, in nats; only that of reporting ranks is used. A row gets
            the mean over its tokens.
    """
    means = None
    if batch is not None and entropy is not None and layout.is_reporting_rank:
        means = mean_entropy(batch, entropy).tolist()
    gathered = waiting.gather_on_main(
        (layout.data_rank, rows if layout.is_leader else None, means), "the samples of every rank"
    )
    if gathered is None:
        return []
    entropies = {data_rank: values for data_rank, _, values in gathered if values is not None}
    found = []
    for data_rank, of_rank, _ in gathered:
        for number, row in enumerate(of_rank or ()):
            found.append(row | {"entropy": entropies[data_rank][number]} if data_rank in entropies else row)
    return sorted(found, key=lambda row: (row["slot"], row["sample"]))


def mean_entropy(batch: RolloutBatch, entropy: Tensor) -> Tensor:
    """Return the mean entropy of each sequence's response tokens, float64 [N], from that of each token, [T]."""
    sums = torch.zeros(len(batch.response_lengths), dtype=torch.float64)
    return sums.index_add(0, batch.sequence_of_token(), entropy.double()) / batch.response_lengths
