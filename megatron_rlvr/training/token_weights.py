"""Aggregation weights of a step's tokens, over the minibatches of the whole job."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_rlvr.config import Config
from megatron_rlvr.data.batch import RolloutBatch
from megatron_rlvr.megatron import collectives, parallel
from megatron_rlvr.objectives import aggregation_weights


def token_weights(config: Config, batch: RolloutBatch, layout: parallel.Layout) -> Tensor:
    """float32 [N]: the aggregation weight of every token of each sequence within its minibatch, over the whole job."""
    parts = batch.minibatches(config.algorithm.minibatches)
    tokens = {f"{m:06d}": float(batch.response_lengths[part].sum()) for m, part in enumerate(parts)}
    totals = collectives.sum_over_job(tokens, contributes=layout.is_leader)
    weights = [
        aggregation_weights(
            config.algorithm.aggregation,
            batch.response_lengths[part],
            config.rollout.max_tokens,
            sequence_count=len(part) * layout.data_size,
            token_count=int(total),
        )
        for part, total in zip(parts, totals.values(), strict=True)
    ]
    return torch.cat(weights)
