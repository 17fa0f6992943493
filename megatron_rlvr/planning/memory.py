"""Bytes of one rank: what stands all the time, and what a phase of a step adds. All of it computed."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from megatron_rlvr.config import Config
from megatron_rlvr.ops.vocab_projection import DEFAULT_CHUNK_BYTES
from megatron_rlvr.planning.stages import ModelShape, Stage

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
        cache: key/value cache of generation by the training weights.
        sync: the tensor that an export or a weight update gathers.
    """

    activations: int
    head: int
    cache: int
    sync: int

    @property
    def update(self) -> int:
        return self.activations + self.head

    @property
    def generation(self) -> int:
        return self.cache + self.sync

    @property
    def peak(self) -> int:
        return max(self.update, self.generation)


def static_memory(stage: Stage, config: Config, dtype: torch.dtype, data_parallel: int) -> Static:
    """Weights, float32 gradients and Adam's state, as megatron-core allocates them.

    Two float32 moments a parameter and, for bfloat16 weights, a float32 master copy. The distributed optimizer keeps
    1 / data_parallel of these, and pads its buffers: every parameter to 64 elements, a bucket to lcm(ranks, 128).
    """
    states = 8 if dtype == torch.float32 else 12
    count = stage.count
    if config.parallel.distributed_optimizer:
        count = _padded_buffer(stage, data_parallel)
    shards = data_parallel if config.parallel.distributed_optimizer else 1
    return Static(weights=count * dtype.itemsize, gradients=count * 4, optimizer=count * states // shards)


def _padded_buffer(stage: Stage, data_parallel: int) -> int:
    divisor = math.lcm(data_parallel, 128)
    end = 0
    for numel in stage.parameters:
        end = _round_up(end, 64) + numel
        if stage.shared_embedding == numel:  # a bucket of its own
            end = _round_up(end, divisor)
    return _round_up(end, divisor)


def _round_up(number: int, divisor: int) -> int:
    return -(-number // divisor) * divisor


def layer_activation_bytes(shape: ModelShape, tokens: int, config: Config, itemsize: int) -> int:
    """What one layer keeps of one microbatch without recomputation, with fused norms, rotary embedding and attention.

    Per token: both residual inputs and their norms' outputs (4 h, split under sequence parallelism), rotated queries,
    keys and values, the attention output with its float32 logsumexp, and gate, up and their product (3 f); queries and
    keys before their norms where a family has those.
    """
    tensor = config.parallel.tensor
    sequence = tensor if config.parallel.sequence else 1
    attention = 2 * shape.query + 2 * shape.key_value + (shape.query + shape.key_value if shape.query_norm else 0)
    split = (attention + 3 * shape.feed_forward) * itemsize + 4 * shape.heads
    return tokens * (4 * shape.hidden * itemsize // sequence + split // tensor)


def phase_memory(shape: ModelShape, stage: Stage, config: Config, itemsize: int, data_parallel: int) -> Phases:
    """The longest sequences that the configuration allows, in every sequence of a microbatch."""
    parallel, rollout = config.parallel, config.rollout
    sequences, microbatches = microbatch(config, data_parallel)
    width = config.data.max_prompt_tokens + rollout.max_tokens
    tokens, answered = sequences * width, sequences * rollout.max_tokens
    in_flight = min(parallel.pipeline - stage.index, microbatches)
    activations = in_flight * stage.layers * layer_activation_bytes(shape, tokens, config, itemsize)
    head = 0
    last = stage.index == parallel.pipeline - 1
    if last:
        shard = shape.vocabulary // parallel.tensor
        hidden = (tokens + answered) * shape.hidden * itemsize  # after the final norm: gathered, and the rows asked for
        if config.algorithm.fused_linear:
            # hidden states and their gradient, one chunk of logits, the weight's gradient in float32
            head = 2 * hidden + DEFAULT_CHUNK_BYTES + shard * shape.hidden * 4
        else:
            # logits, over which the operator writes their gradient
            head = 2 * hidden + answered * shard * itemsize
    cached = min(rollout.local_batch, rollout.prompts_per_step * rollout.samples_per_prompt // data_parallel)
    cache = cached * width * stage.layers * 2 * shape.key_value // parallel.tensor * itemsize
    if last:
        cache += cached * shape.vocabulary * 4
    return Phases(activations, head, cache, sync=2 * stage.largest_tensor * itemsize)


def microbatch(config: Config, data_parallel: int) -> tuple[int, int]:
    """Sequences of a microbatch, and microbatches of a minibatch on one data-parallel rank."""
    rollout = config.rollout
    mine = rollout.prompts_per_step * rollout.samples_per_prompt // (config.algorithm.minibatches * data_parallel)
    sequences = min(config.parallel.microbatch_sequences or mine, mine)
    return sequences, -(-mine // sequences)
