"""Bytes of activations: what a layer keeps for its backward pass, and how many layers keep it at once."""

from __future__ import annotations

from megatron_rlvr.megatron.config import ParallelConfig
from megatron_rlvr.megatron.stage_shapes import ModelShape, Stage


def activation_bytes(
    shape: ModelShape,
    stage: Stage,
    parallel: ParallelConfig,
    tokens: int,
    microbatches: int,
    itemsize: int,
    local_layers: bool,
) -> int:
    """Bytes that a rank of a stage keeps for the backward passes of all microbatches in flight.

    Args:
        shape: the model's dimensions.
        stage: pipeline stage of the rank.
        parallel: the layout.
        tokens: tokens of a microbatch on this rank, before sequence parallelism splits them.
        microbatches: microbatches per minibatch.
        itemsize: bytes per element of an activation.
        local_layers: whether the layers are megatron-core's local ones, not Transformer Engine's.
    """
    per_layer = layer_activation_bytes(shape, parallel, tokens, itemsize, local_layers)
    kept = per_layer
    if parallel.recompute == "full":  # only the layer's input is kept
        kept = tokens * shape.hidden * itemsize // sequence_ranks(parallel)
    total = layers_in_flight(stage, parallel, microbatches) * kept
    if kept < per_layer:  # the backward pass recomputes one layer at a time
        total += per_layer
    if parallel.sequence:  # megatron-core gathers the split activations into a buffer
        total += tokens * shape.hidden * itemsize
    return total


def layer_activation_bytes(
    shape: ModelShape, parallel: ParallelConfig, tokens: int, itemsize: int, local_layers: bool
) -> int:
    """Bytes that one layer keeps of one microbatch without recomputation; arguments as in `activation_bytes`.

    In elements per token, with h the hidden size and f the feed-forward size:

    - Transformer Engine, which fuses norms, rotary embedding and attention: both residual inputs and the outputs of
      their norms (4 h, split under sequence parallelism); rotated queries, keys and values; the attention output and
      its float32 logsumexp; gate, up and their product (3 f). A family with norms of queries and keys also keeps
      queries and keys before their norms.
    - Local layers: 6 h instead of 4 h. A family with norms of queries and keys also keeps the projection before it is
      split (queries, keys and values once more). Counted on the CPU.
    - A mixture of experts: for each expert of a token its input and output (2 h) and 3 f of the expert, and the
      router's float32 probabilities. Tokens are spread evenly over experts.
    """
    tensor, sequence = parallel.tensor, sequence_ranks(parallel)
    residual = 6 if local_layers else 4
    copies = 2 + (2 if local_layers else 1) * shape.query_norm
    attention = copies * (shape.query + shape.key_value)
    kept = (residual * shape.hidden * itemsize) // sequence + (attention * itemsize + 4 * shape.heads) // tensor
    if not shape.experts:
        return tokens * (kept + 3 * shape.feed_forward * itemsize // tensor)
    per_expert = (2 * shape.hidden + 3 * shape.expert_feed_forward // parallel.expert_tensor) * itemsize
    # Ranks that split an expert all process the tokens of their group.
    routed = shape.chosen * per_expert * parallel.expert_tensor // sequence
    return tokens * (kept + routed + 4 * shape.experts // sequence)


def feed_forward_gradient_bytes(
    shape: ModelShape, parallel: ParallelConfig, tokens: int, itemsize: int, local_layers: bool
) -> int:
    """Bytes that the backward pass of one layer needs in addition to what was kept; arguments as in `activation_bytes`.

    The larger of two moments in the feed-forward part, in elements per token:

    - the gradient of the product becomes the gradients of gate and up: 2 f and h; local layers also hold a
      product, 4 f and h.
    - the gradient of the product was just computed: f and 3 h; local layers also hold the gradient of the weight, f h
      elements in all, before it is added to the gradient buffer.
    """
    sequence = sequence_ranks(parallel)
    inner = shape.feed_forward // parallel.tensor
    weight = inner * shape.hidden
    if shape.experts:
        inner = shape.chosen * shape.expert_feed_forward // sequence
        weight = shape.expert_feed_forward // parallel.expert_tensor * shape.hidden
    gate_and_up = tokens * ((4 if local_layers else 2) * inner + shape.hidden // sequence)
    product = tokens * (inner + 3 * shape.hidden // sequence) + (weight if local_layers else 0)
    return max(gate_and_up, product) * itemsize


def layers_in_flight(stage: Stage, parallel: ParallelConfig, microbatches: int) -> int:
    """Layers times microbatches whose activations a stage holds at once, under 1F1B or the interleaved schedule."""
    chunks = parallel.virtual_pipeline
    if chunks == 1:
        return stage.layers * min(parallel.pipeline - stage.index, microbatches)
    # Narayanan et al., arXiv 2104.04473: 2 (p - rank - 1) + (v - 1) p chunks warm up, and one more is computed.
    warm = 2 * (parallel.pipeline - stage.index - 1) + (chunks - 1) * parallel.pipeline + 1
    return stage.layers * min(warm, microbatches * chunks) // chunks


def sequence_ranks(parallel: ParallelConfig) -> int:
    """Ranks that split the tokens between a layer's matrices."""
    return parallel.tensor if parallel.sequence else 1
