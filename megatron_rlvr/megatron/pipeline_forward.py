"""A forward pass through all pipeline stages without megatron-core's schedule, for generation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_rlvr.megatron import collectives, device
from megatron_rlvr.megatron.model import PolicyModel


def pipeline_forward(
    model_chunks: Sequence[PolicyModel], tokens: Tensor, positions: Tensor, mask: Tensor | None, rows: Tensor | None
) -> Tensor | None:
    """Run one batch through the pipeline. Collective over the model-parallel group.

    Args:
        model_chunks: model chunks of this process.
        tokens, positions, mask, rows: arguments of `PolicyModel.forward`, on any device.

    Returns:
        logits [n, V] over the full vocabulary on the last stage, None on the other stages.
    """
    target = device.device()
    tokens, positions = tokens.to(target), positions.to(target)
    mask = mask.to(target) if mask is not None else None
    rows = rows.to(target) if rows is not None else None
    for chunk in model_chunks:
        output = _through_chunk(chunk, tokens, positions, mask, rows)
    return output


def _through_chunk(
    chunk: PolicyModel, tokens: Tensor, positions: Tensor, mask: Tensor | None, rows: Tensor | None
) -> Tensor | None:
    """Receive hidden states from the previous stage, run `chunk`, and send its output to the next stage."""
    config = chunk.config
    if not chunk.pre_process:
        shape = (tokens.size(1), tokens.size(0), config.hidden_size)
        received = torch.empty(shape, dtype=config.params_dtype, device=tokens.device)
        collectives.receive_from_previous_stage(received)
        chunk.set_input_tensor(received)
    output = chunk(tokens, rows, positions=positions, attention_mask=mask)
    if not chunk.post_process:
        collectives.send_to_next_stage(output)
        return None
    ranks = config.tensor_model_parallel_size
    if ranks > 1:
        # The last shard is shorter if the ranks do not divide the vocabulary.
        padding = -(-chunk.vocabulary // ranks) - output.size(-1)
        shards = collectives.all_gather_over_tensor_ranks(torch.nn.functional.pad(output, (0, padding)))
        output = torch.cat(shards, dim=-1)[:, : chunk.vocabulary]
    return output
