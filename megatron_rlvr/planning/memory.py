"""Bytes of one rank: what stands all the time, and what a phase of a step adds. All of it computed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_rlvr.config import Config
from megatron_rlvr.megatron.stage_shapes import ModelShape, Stage
from megatron_rlvr.ops.vocab_projection import DEFAULT_CHUNK_BYTES
from megatron_rlvr.rollout.engines.sglang.launch_arguments import ServerLayout

GIB = 1024**3
CONTEXT_BYTES = 4 * GIB
"""Assumed for the CUDA context, NCCL's buffers, cuBLAS workspace and fragmentation; not computed."""


@dataclass(frozen=True)
class Static:
    """Bytes that a rank holds from its first step on."""

    weights: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer


@dataclass(frozen=True)
class Phases:
    """Bytes that the update and the generation add to the static ones, one after the other.

    Attributes:
        activations: kept for the backward pass by the microbatches in flight.
        head: logits and what the operators need beside them.
        working: gradients on their way through one feed-forward layer; the head's are gone by then.
        cache: key/value cache of generation by the training weights; of SGLang servers their weights, which stay there.
        sync: the tensor that an export or a weight update gathers, and the buckets that take it to SGLang servers.
    """

    activations: int
    head: int
    working: int
    cache: int
    sync: int

    @property
    def update(self) -> int:
        return self.activations + max(self.head, self.working)

    @property
    def generation(self) -> int:
        return self.cache + self.sync


def static_memory(stage: Stage, config: Config, dtype: torch.dtype, data_parallel: int) -> Static:
    """Weights, float32 gradients and Adam's state, as megatron-core allocates them.

    Two float32 moments a parameter and, for bfloat16 weights, a float32 master copy. The distributed optimizer spreads
    these over data- and context-parallel ranks, those of experts over the ranks that hold the same ones, and pads its
    buffers: every parameter to 64 elements, a bucket to lcm(ranks, 128).
    """
    parallel = config.parallel
    ranks = data_parallel * parallel.context
    holders = max(1, ranks * parallel.tensor // (parallel.expert * parallel.expert_tensor))
    states = 8 if dtype == torch.float32 else 12
    found = Static(0, 0, 0)
    for parameters, shards in ((stage.parameters, ranks), (stage.experts, holders)):
        count = sum(parameters)
        if not parallel.distributed_optimizer:
            shards = 1
        else:
            count = _padded_buffer(parameters, stage.shared_embedding, shards)
        found = Static(
            found.weights + count * dtype.itemsize,
            found.gradients + count * 4,
            found.optimizer + count * states // shards,
        )
    offloaded = int(found.optimizer * config.optimizer.cpu_offload)
    return Static(found.weights, found.gradients, found.optimizer - offloaded)


def _padded_buffer(parameters: Sequence[int], shared_embedding: int, ranks: int) -> int:
    divisor = math.lcm(ranks, 128)
    end = 0
    for numel in parameters:
        end = _round_up(end, 64) + numel
        if shared_embedding == numel:  # a bucket of its own
            end = _round_up(end, divisor)
    return _round_up(end, divisor)


def _round_up(number: int, divisor: int) -> int:
    return -(-number // divisor) * divisor


def layer_activation_bytes(shape: ModelShape, tokens: int, config: Config, itemsize: int) -> int:
    """What one layer keeps of one microbatch without recomputation.

    Per token with Transformer Engine, whose norms, rotary embedding and attention are fused: both residual inputs and
    their norms' outputs (4 h, split under sequence parallelism), rotated queries, keys and values, the attention output
    with its float32 logsumexp, and gate, up and their product (3 f); queries and keys before their norms where a family
    has those. The local layers keep 6 h, and where a family has norms of queries and keys the unsplit projection (q and
    kv more), as counted on the CPU. A mixture of experts keeps, for every expert of a token, its input and output (2 h)
    and 3 f of the expert instead, and the router's float32 probabilities; spread evenly over experts.
    """
    tensor = config.parallel.tensor
    sequence = tensor if config.parallel.sequence else 1
    residual = 6 if is_local(config) else 4
    copies = 2 + (2 if is_local(config) else 1) * shape.query_norm
    attention = copies * (shape.query + shape.key_value)
    kept = (residual * shape.hidden * itemsize) // sequence + (attention * itemsize + 4 * shape.heads) // tensor
    if not shape.experts:
        return tokens * (kept + 3 * shape.feed_forward * itemsize // tensor)
    a_choice = (2 * shape.hidden + 3 * shape.expert_feed_forward // config.parallel.expert_tensor) * itemsize
    # Ranks that split an expert all see the tokens of their group.
    routed = shape.chosen * a_choice * config.parallel.expert_tensor // sequence
    return tokens * (kept + routed + 4 * shape.experts // sequence)


def working_bytes(shape: ModelShape, tokens: int, config: Config, itemsize: int) -> int:
    """What the backward pass of one layer needs beside what was kept: the most of two moments of its feed-forward part.

    The gradient of the product becomes those of gate and up (2 f a token, and h; in the local layers beside it and a
    product of it, 4 f); or it was just made (f, and 3 h), where the local layers hold the gradient of the weight, f h,
    too, before it is added to the buffer.
    """
    parallel = config.parallel
    sequence = parallel.tensor if parallel.sequence else 1
    inner, weight = shape.feed_forward // parallel.tensor, shape.feed_forward // parallel.tensor * shape.hidden
    if shape.experts:
        inner = shape.chosen * shape.expert_feed_forward // sequence
        weight = shape.expert_feed_forward // parallel.expert_tensor * shape.hidden
    both = tokens * ((4 if is_local(config) else 2) * inner + shape.hidden // sequence)
    product = tokens * (inner + 3 * shape.hidden // sequence) + (weight if is_local(config) else 0)
    return max(both, product) * itemsize


def is_local(config: Config) -> bool:
    """Whether layers are megatron-core's own; on a GPU `auto` is Transformer Engine."""
    return config.model.layer_spec == "local"


def layers_in_flight(stage: Stage, config: Config, microbatches: int) -> int:
    """Layers times microbatches whose activations a stage holds at once, under 1F1B or the interleaved schedule."""
    parallel = config.parallel
    parts = parallel.virtual_pipeline
    if parts == 1:
        return stage.layers * min(parallel.pipeline - stage.index, microbatches)
    # Narayanan et al., arXiv 2104.04473: warm-up of 2 (p - rank - 1) + (v - 1) p parts, and the one that is computed.
    warm = 2 * (parallel.pipeline - stage.index - 1) + (parts - 1) * parallel.pipeline + 1
    return stage.layers * min(warm, microbatches * parts) // parts


def phase_memory(shape: ModelShape, stage: Stage, config: Config, itemsize: int, data_parallel: int) -> Phases:
    """The longest sequences that the configuration allows, in every sequence of a microbatch."""
    parallel, rollout = config.parallel, config.rollout
    sequences, microbatches = microbatch(config, data_parallel)
    width = config.data.max_prompt_tokens + rollout.max_tokens
    whole = parallel.microbatch_tokens or sequences * width
    tokens, answered = whole // parallel.context, whole * rollout.max_tokens // width // parallel.context
    layer = layer_activation_bytes(shape, tokens, config, itemsize)
    a_layer = layer
    if parallel.recompute == "full":
        a_layer = tokens * shape.hidden * itemsize // (parallel.tensor if parallel.sequence else 1)
    activations = layers_in_flight(stage, config, microbatches) * a_layer + (layer if a_layer < layer else 0)
    if parallel.sequence:  # megatron-core's buffer that split activations are gathered into
        activations += tokens * shape.hidden * itemsize
    working = working_bytes(shape, tokens, config, itemsize)
    head = 0
    last = stage.index == parallel.pipeline - 1
    if last:
        shard = shape.vocabulary // parallel.tensor
        hidden = (tokens + answered) * shape.hidden * itemsize  # after the final norm: gathered, and the rows asked for
        if config.algorithm.fused_linear:
            # hidden states and their gradient, one chunk of logits, and what megatron-core's hook is given in place of
            # the weight's gradient, which went straight into the buffer
            chunk = min(DEFAULT_CHUNK_BYTES["cuda"], answered * shard * itemsize)
            head = 2 * hidden + chunk + shard * shape.hidden * itemsize
        else:
            # logits, over which the operator writes their gradient
            head = 2 * hidden + answered * shard * itemsize
            if is_local(config):
                head += shard * shape.hidden * itemsize  # of the weight, before it is added to the buffer
    sync = 2 * stage.largest_tensor * itemsize
    if rollout.engine == "sglang":
        if stage.index == 0 and weight_sync(config) != "disk":
            # On the main process, which is of the first stage. A bucket is there before the last one is let go; a
            # tensor that is larger has one of its own.
            bucket = rollout.sglang.bucket_mb * 1024**2
            sync += bucket + max(bucket, stage.largest_tensor * itemsize)
        return Phases(activations, head, working, server_weights(shape, config, itemsize), sync)
    cached = min(rollout.local_batch, rollout.prompts_per_step * rollout.samples_per_prompt // data_parallel)
    cache = cached * width * stage.layers * 2 * shape.key_value // parallel.tensor * itemsize
    if last:
        cache += cached * shape.vocabulary * 4
    return Phases(activations, head, working, cache, sync)


def weight_sync(config: Config, nodes: int = 1) -> str:
    """How SGLang servers get new weights: ``tensor``, ``distributed`` or ``disk``.

    Shared memory ends at the main process's machine, so on several nodes it is a broadcast that is planned.
    """
    way = config.rollout.sglang.weight_sync
    if way == "auto":
        way = "disk" if config.rollout.sglang.urls else "tensor"
    return "distributed" if way == "tensor" and nodes > 1 else way


def server_weights(shape: ModelShape, config: Config, itemsize: int) -> int:
    """Bytes of an SGLang server's weights on one of its GPUs; 0 for servers on other machines."""
    sglang = config.rollout.sglang
    if sglang.urls:
        return 0
    return shape.parameters * itemsize // ServerLayout.from_arguments(sglang.server).gpus_per_replica


def microbatch(config: Config, data_parallel: int) -> tuple[int, int]:
    """Sequences of a microbatch, and microbatches of a minibatch on one data-parallel rank."""
    rollout, budget = config.rollout, config.parallel.microbatch_tokens
    mine = rollout.prompts_per_step * rollout.samples_per_prompt // (config.algorithm.minibatches * data_parallel)
    if budget:
        sequences = max(1, min(mine, budget // (config.data.max_prompt_tokens + rollout.max_tokens)))
        return sequences, -(-mine // sequences)
    sequences = min(config.parallel.microbatch_sequences or mine, mine)
    return sequences, -(-mine // sequences)
