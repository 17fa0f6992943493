"""Aggregation weights of the tokens of a step."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_rlvr.data.batch import RolloutBatch
from megatron_rlvr.megatron import collectives, parallel
from megatron_rlvr.objectives import aggregation_weights
from megatron_rlvr.training.config import AlgorithmConfig


def token_weights(batch: RolloutBatch, algorithm: AlgorithmConfig, max_tokens: int, layout: parallel.Layout) -> Tensor:
    """Return the aggregation weight of every token of each sequence, float32 [N].

    Weights are normalized over each minibatch of the whole job. Collective over the job: one all-reduce.

    Args:
        batch: this rank's rollouts.
        algorithm: aggregation and number of minibatches.
        max_tokens: longest response, `rollout.max_tokens`.
        layout: position of this process in the process groups.
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
