"""Aggregation weights of a step's tokens, over the minibatches of the whole job."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_rlvr.data.batch import RolloutBatch
from megatron_rlvr.megatron import collectives, parallel
from megatron_rlvr.objectives import aggregation_weights
from megatron_rlvr.training.config import AlgorithmConfig


def token_weights(batch: RolloutBatch, algorithm: AlgorithmConfig, max_tokens: int, layout: parallel.Layout) -> Tensor:
    """The aggregation weight of every token of each sequence, float32 [N]. Collective over the job.

    Args:
        batch: this rank's rollouts.
        algorithm: names the aggregation, which is over each minibatch of the whole job.
        max_tokens: longest response, `rollout.max_tokens`.
        layout: of this process.
    """
    minibatches = batch.minibatches(algorithm.minibatches)
    tokens = {
        f"{number:06d}": float(batch.response_lengths[sequences].sum()) for number, sequences in enumerate(minibatches)
    }
    job_tokens = collectives.sum_over_job(tokens, contributes=layout.is_leader)
    weights = [
        aggregation_weights(
            algorithm.aggregation,
            batch.response_lengths[sequences],
            max_tokens,
            sequence_count=len(sequences) * layout.data_size,
            token_count=int(total),
        )
        for sequences, total in zip(minibatches, job_tokens.values(), strict=True)
    ]
    return torch.cat(weights)
