"""Bytes of activations: what a layer keeps for its backward pass, and how many layers keep it at once."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_rlvr.megatron.config import ParallelConfig
from megatron_rlvr.megatron.stage_shapes import AdaptedLayer, ModelShape, Stage


def activation_bytes(
    shape: ModelShape,
    stage: Stage,
    parallel: ParallelConfig,
    tokens: int,
    microbatches: int,
    itemsize: int,
    local_layers: bool,
    rank: int = 0,
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
        rank: rank of the adapters; 0 if there are none.
    """
    counts = {True: stage.mixtures, False: stage.layers - stage.mixtures}
    sizes = {
        mixture: layer_activation_bytes(shape, parallel, tokens, itemsize, local_layers, mixture, frozen=rank > 0)
        + (
            adapter_activation_bytes(
                shape, stage.adapted[mixture], parallel, tokens, itemsize, local_layers, rank, mixture
            )
            if rank
            else 0
        )
        for mixture, count in counts.items()
        if count
    }
    in_flight = layers_in_flight(stage, parallel, microbatches)
    if parallel.recompute == "full":  # the input of every layer is kept, and the backward pass recomputes one at a time
        total = in_flight * (tokens * shape.hidden * itemsize // sequence_ranks(parallel)) + max(sizes.values())
    else:
        total = in_flight * sum(counts[mixture] * size for mixture, size in sizes.items()) // stage.layers
    if parallel.sequence and not rank:  # megatron-core gathers the input of a layer with trained weights into a buffer
        total += tokens * shape.hidden * itemsize
    return total


def layer_activation_bytes(
    shape: ModelShape,
    parallel: ParallelConfig,
    tokens: int,
    itemsize: int,
    local_layers: bool,
    mixture: bool,
    frozen: bool = False,
) -> int:
    """Bytes that one layer keeps of one microbatch without recomputation; arguments as in `activation_bytes`.

    A layer is a `mixture` or dense. If its weights are `frozen`, adapters keep the inputs of its linear layers, all of
    which are counted here (`adapter_activation_bytes`).

    With h the hidden size, q and kv the sizes of queries and of keys, f the feed-forward size, and E experts of which a
    token chooses k. Elements per token of Transformer Engine 2.11 under the settings of `megatron.fusions`, as its
    autograd functions save them:

    ==================================  =======================================================================
    LayerNormLinear, twice              its input and the output of its norm: 2 h each, split under sequence
                                        parallelism; one float32 per token
    fused rotary embedding              nothing of this size
    attention                           rotated queries and keys, a contiguous copy of the values, the output, and
                                        the logsumexp: 2 q + 2 kv, and a float32 per head
    Linear after attention, fc2         their inputs: the output of attention (counted) and the product: f
    fused SwiGLU                        its input, gate and up: 2 f
    RMSNorm of queries and keys         their contiguous inputs: q + kv, and a float32 per head of each
    RMSNorm, router                     of a mixture: as one LayerNormLinear; the probabilities in float32 and the
                                        chosen experts as bytes: 5 E bytes
    fused permutation                   int32 row maps: 4 (2 E + 1) bytes per token, 12 bytes per chosen expert with
                                        the probability
    grouped fc1, weighted SwiGLU, fc2   per chosen expert: h + 3 f of the expert; the fused unpermutation keeps no
                                        output, because the probabilities were applied before fc2
    shared experts                      3 f of all of them
    latent attention                    input and output of the norms of its latents: 2 elements per element, split
                                        under sequence parallelism; queries, keys, values and output as above
    norms of outputs, of Gemma 3        their inputs: 2 h, split under sequence parallelism
    ==================================  =======================================================================

    Local layers keep 6 h instead of 4 h, because torch's norm keeps its normalized input too. A family with norms of
    queries and keys keeps these before and after normalization and the projection before it is split, 3 q + 2 kv more,
    and a mixture the product before and after it is weighted (h + 4 f of the expert). Latent attention keeps three
    elements per element of its latents, the projection that the latent of keys and values is a part of, and heads of
    values and of its output that are padded to the size of queries. The normalized input is there for the gradient of
    the norm's weight: a frozen norm, also one of queries, keys or latents, keeps one element per element less. Counted
    on the CPU in float32 with saved-tensor hooks (`tests/unit/planning/test_activations.py`). Tokens are spread evenly
    over experts.
    """
    tensor, sequence = parallel.tensor, sequence_ranks(parallel)
    normalized = int(local_layers and not frozen)
    heads, attention = shape.heads, shape.query + shape.key + shape.value + shape.attended
    if shape.query_norm:
        heads += shape.heads + shape.heads * shape.key // shape.query
        attention += shape.query + shape.key + normalized * (shape.query + shape.key)
        attention += shape.query if local_layers else 0
    residual, norms = (4 + 2 * normalized) * shape.hidden, 2
    if shape.post_norms:
        residual, norms = residual + (2 + 2 * normalized) * shape.hidden, 4
    if shape.latent:
        residual, norms = residual + (2 + normalized) * shape.latent, 4
        attention += 2 * shape.query - shape.value if local_layers else 0
    kept = (residual * itemsize + 4 * norms) // sequence + (attention * itemsize + 4 * heads) // tensor
    if not mixture:
        return tokens * (kept + 3 * shape.feed_forward * itemsize // tensor)
    kept += 3 * shape.shared_feed_forward * itemsize // tensor
    inner = (4 if local_layers else 3) * shape.expert_feed_forward // parallel.expert_tensor
    per_expert = (shape.hidden + inner) * itemsize + (24 if local_layers else 12)
    router = 5 * shape.experts + (0 if local_layers else 4 * (2 * shape.experts + 1))
    # Ranks that split an expert all process the tokens of their group.
    routed = shape.chosen * per_expert * parallel.expert_tensor // sequence
    return tokens * (kept + routed + router // sequence)


def adapter_activation_bytes(
    shape: ModelShape,
    adapted: Sequence[AdaptedLayer],
    parallel: ParallelConfig,
    tokens: int,
    itemsize: int,
    local_layers: bool,
    rank: int,
    mixture: bool,
) -> int:
    """Bytes that adapters add to what a layer with frozen weights keeps of one microbatch; arguments as above.

    Frozen linear layers keep nothing, and the first matrix of an adapter keeps the input of its layer in their place,
    which `layer_activation_bytes` counts for all of them. So the inputs of layers without adapters are left out, if
    nothing else keeps them. Adapters add the products with their first matrices, ``rank`` elements per token and
    module, and two matrices that combine the modules of one layer of megatron-core, of queries, keys and values or of
    gate and up: the rows of all their A, and the columns of all their B.

    Args:
        adapted: the adapters of the layer on this rank.
    """
    sequence = sequence_ranks(parallel)
    routed = sum(layer.routed for layer in adapted)  # layers of all experts, among which tokens are spread evenly
    kinds = len({layer.name for layer in adapted if layer.routed})
    elements = 0
    for layer in adapted:
        share = tokens * layer.modules * rank
        if layer.routed:
            share = share * shape.chosen * parallel.expert_tensor * kinds // routed // sequence
        elif layer.splits_tokens:
            share //= sequence
        elements += layer.modules * rank * (layer.inputs + layer.outputs) + share
    return (elements - tokens * _inputs_not_kept(shape, adapted, parallel, local_layers, mixture)) * itemsize


def _inputs_not_kept(
    shape: ModelShape, adapted: Sequence[AdaptedLayer], parallel: ParallelConfig, local_layers: bool, mixture: bool
) -> int:
    """Elements per token of the inputs of linear layers without adapters that nothing else keeps."""
    names = {(layer.name, layer.routed) for layer in adapted}
    sequence = sequence_ranks(parallel)
    of_attention = {"linear_qkv", "linear_q_proj", "linear_q_down_proj", "linear_kv_down_proj"}
    left_out = 0
    if not any((name, False) in names for name in of_attention):
        left_out += shape.hidden // sequence
    latents = sum(layer.inputs for layer in adapted if layer.name in ("linear_q_up_proj", "linear_kv_up_proj"))
    left_out += (shape.latent - latents) // sequence
    if shape.latent and local_layers and ("linear_proj", False) not in names:  # a copy of attention's padded output
        left_out += shape.attended // parallel.tensor
    if not mixture and ("linear_fc1", False) not in names:  # the router of a mixture keeps it
        left_out += shape.hidden // sequence
    if ("linear_fc2", False) not in names:
        left_out += (shape.shared_feed_forward if mixture else shape.feed_forward) // parallel.tensor
    if mixture:
        ranks = parallel.expert_tensor * shape.chosen
        if ("linear_fc1", True) not in names:
            left_out += shape.hidden * ranks // sequence
        if ("linear_fc2", True) not in names:
            left_out += shape.expert_feed_forward // parallel.expert_tensor * ranks // sequence
    return left_out


def feed_forward_gradient_bytes(
    shape: ModelShape,
    parallel: ParallelConfig,
    tokens: int,
    itemsize: int,
    local_layers: bool,
    frozen: bool = False,
) -> int:
    """Bytes that the backward pass of one layer needs in addition to what was kept; arguments as in `activation_bytes`.

    The larger of two moments in the feed-forward part, in elements per token:

    - the gradient of the product becomes the gradients of gate and up: 2 f and h; local layers also hold a
      product, 4 f and h.
    - the gradient of the product was just computed: f and 3 h; local layers also hold the gradient of the weight, f h
      elements in all, before it is added to the gradient buffer.

    Transformer Engine adds gradients of weights to that buffer itself. In their place autograd receives one tensor per
    shape of a weight, which stays allocated: those of attention and 3 f h elements (`_placeholder_bytes`).

    Frozen weights have neither a gradient nor such a tensor.
    """
    sequence = sequence_ranks(parallel)
    inner = shape.feed_forward // parallel.tensor
    weight = inner * shape.hidden
    if shape.experts:
        inner = shape.chosen * shape.expert_feed_forward // sequence
        weight = shape.expert_feed_forward // parallel.expert_tensor * shape.hidden
    gate_and_up = tokens * ((4 if local_layers else 2) * inner + shape.hidden // sequence)
    product = tokens * (inner + 3 * shape.hidden // sequence) + (weight if local_layers and not frozen else 0)
    working = max(gate_and_up, product) * itemsize
    return working if local_layers or frozen else working + _placeholder_bytes(shape, parallel, itemsize)


def _placeholder_bytes(shape: ModelShape, parallel: ParallelConfig, itemsize: int) -> int:
    """Bytes of the tensors that stand for gradients of weights under ``gradient_accumulation_fusion``."""
    attention = shape.attention_weights // parallel.tensor
    feed_forward = 0
    if shape.experts:
        feed_forward = 3 * (
            shape.expert_feed_forward // parallel.expert_tensor + shape.shared_feed_forward // parallel.tensor
        )
    if shape.mixtures < shape.layers:
        feed_forward += 3 * shape.feed_forward // parallel.tensor
    return (attention + feed_forward * shape.hidden) * itemsize


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
