"""Bytes that one rank needs, computed: those that it holds all the time, and those that each phase of a step adds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from megatron_rlvr.config import Config
from megatron_rlvr.megatron.config import ParallelConfig
from megatron_rlvr.megatron.stage_shapes import ModelShape, Stage
from megatron_rlvr.ops.vocab_projection import DEFAULT_CHUNK_BYTES
from megatron_rlvr.planning.activations import activation_bytes, feed_forward_gradient_bytes, layer_activation_bytes
from megatron_rlvr.planning.batch import local_batch, longest_sequence, microbatches
from megatron_rlvr.planning.reference import reference_memory
from megatron_rlvr.planning.servers import GIB, SERVER_RUNTIME_BYTES, Servers, memory_fraction, weight_bytes
from megatron_rlvr.rollout.engines.sglang.config import SGLangConfig

CONTEXT_BYTES = 4 * GIB
"""Assumed, not computed: CUDA context, NCCL's buffers, cuBLAS workspace and fragmentation."""


@dataclass(frozen=True)
class StaticMemory:
    """Bytes that a rank holds from its first step on; `reference` has the weights of a reference on the GPU."""

    weights: int
    gradients: int
    optimizer: int
    reference: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.reference


@dataclass(frozen=True)
class PhaseMemory:
    """Bytes that scoring, update and generation, one after the other, add to the static memory.

    Attributes:
        activations: kept for the backward pass by the microbatches in flight.
        head: logits, and what their operators need in addition.
        feed_forward: gradients in the backward pass of one feed-forward layer; those of the head are freed by then.
        cache: key/value cache of the local engine.
        server: what an SGLang server on the same GPU keeps for weights and cache, or its weights alone if
            ``mem_fraction_static`` is not set.
        server_runtime: what the server's process takes besides, all the time.
        export: the tensor that an export or a weight update gathers, and the buckets that take it to the servers.
        scoring: weights of the reference that are on the GPU only while it is scored, activations of a layer and head;
            0 without such a reference, because scoring then needs less than the update.
    """

    activations: int
    head: int
    feed_forward: int
    cache: int
    server: int
    server_runtime: int
    export: int
    scoring: int = 0

    @property
    def update(self) -> int:
        return self.activations + max(self.head, self.feed_forward)

    @property
    def training(self) -> int:
        """The larger of scoring and update."""
        return max(self.scoring, self.update)

    @property
    def generation(self) -> int:
        return self.cache + self.server + self.export


class StageMemory(NamedTuple):
    """Bytes of a rank of one pipeline stage."""

    static: StaticMemory
    phases: PhaseMemory


def peak_bytes(stage: StageMemory, released: bool) -> int:
    """Peak bytes of a rank and of the server on its GPU.

    Args:
        stage: memory of the rank's stage.
        released: whether the server releases its memory for the update (`rollout.sglang.release_memory`).
    """
    static, phases = stage
    training = phases.training + (0 if released else phases.server)
    return static.total + max(training, phases.generation) + CONTEXT_BYTES + phases.server_runtime


def server_room(stages: Sequence[StageMemory], gpu_bytes: float, released: bool) -> float:
    """Bytes that a server may keep on a GPU for weights and cache, next to training; arguments as in `peak_bytes`."""
    rooms = []
    for static, phases in stages:
        exporting = phases.cache + phases.export
        busy = exporting if released else max(phases.training, exporting)
        rooms.append(gpu_bytes - static.total - busy - CONTEXT_BYTES - phases.server_runtime)
    return min(rooms)


def static_memory(
    stage: Stage, parallel: ParallelConfig, dtype: torch.dtype, data_parallel: int, cpu_offload: float = 0.0
) -> StaticMemory:
    """Weights, float32 gradients and Adam's state, as megatron-core allocates them. Frozen weights have only the first.

    Adam has two float32 moments per parameter and, for bfloat16 weights, a float32 master copy. The distributed
    optimizer spreads these over data- and context-parallel ranks, those of experts over the ranks that hold the same
    experts. It pads its buffers: every parameter to 64 elements, a bucket to lcm(ranks, 128).

    Args:
        stage: pipeline stage of the rank.
        parallel: the layout.
        dtype: type of the weights.
        data_parallel: number of data-parallel ranks.
        cpu_offload: share of Adam's state that is in host memory.
    """
    ranks = data_parallel * parallel.context
    expert_ranks = max(1, ranks * parallel.tensor // (parallel.expert * parallel.expert_tensor))
    adam_bytes = 8 if dtype == torch.float32 else 12
    weights, gradients, optimizer = stage.frozen * dtype.itemsize, 0, 0
    shared_embedding = 0 if stage.frozen else stage.shared_embedding
    for parameters, shards in ((stage.parameters, ranks), (stage.experts, expert_ranks)):
        count = sum(parameters)
        if parallel.distributed_optimizer:
            count = _padded_buffer(parameters, shared_embedding, shards)
        else:
            shards = 1
        weights += count * dtype.itemsize
        gradients += count * 4
        optimizer += count * adam_bytes // shards
    return StaticMemory(weights, gradients, optimizer - int(optimizer * cpu_offload))


def _padded_buffer(parameters: Sequence[int], shared_embedding: int, ranks: int) -> int:
    """Elements of a buffer of the distributed optimizer."""
    divisor = math.lcm(ranks, 128)
    end = 0
    for numel in parameters:
        end = _round_up(end, 64) + numel
        if shared_embedding == numel:  # it gets a separate bucket
            end = _round_up(end, divisor)
    return _round_up(end, divisor)


def _round_up(number: int, divisor: int) -> int:
    return -(-number // divisor) * divisor


def phase_memory(
    shape: ModelShape,
    stage: Stage,
    config: Config,
    itemsize: int,
    data_parallel: int,
    servers: Servers | None = None,
    gpu_bytes: float = 80e9,
) -> PhaseMemory:
    """Bytes that a step adds if every sequence has the greatest length that the configuration allows.

    Args:
        shape: the model's dimensions.
        stage: pipeline stage of the rank.
        config: the resolved configuration.
        itemsize: bytes per element of weights and activations.
        data_parallel: number of data-parallel ranks.
        servers: where SGLang servers run; none by default.
        gpu_bytes: memory of a GPU.
    """
    parallel, rollout = config.parallel, config.rollout
    local_layers = config.model.layer_spec == "local"
    micro = microbatches(config, data_parallel)
    tokens = micro.tokens // parallel.context
    response_tokens = micro.tokens * rollout.max_tokens // longest_sequence(config) // parallel.context
    last = stage.index == parallel.pipeline - 1
    served = rollout.engine == "sglang"
    shared = servers is not None and servers.placement == "colocated"
    rank = config.lora.rank
    head = _head_bytes(config, shape, tokens, response_tokens, itemsize) if last else 0
    scoring = reference_memory(stage, config, itemsize).scoring
    if scoring:
        kinds = {bool(stage.mixtures), stage.mixtures == stage.layers}  # of layers: with experts, or dense, or both
        scoring += head + max(
            layer_activation_bytes(shape, parallel, tokens, itemsize, local_layers, mixture) for mixture in kinds
        )
    return PhaseMemory(
        activations=activation_bytes(shape, stage, parallel, tokens, micro.count, itemsize, local_layers, rank),
        head=head,
        feed_forward=feed_forward_gradient_bytes(shape, parallel, tokens, itemsize, local_layers, frozen=rank > 0),
        cache=0 if served else _cache_bytes(shape, stage, config, itemsize, data_parallel),
        server=_server_bytes(shape, config, itemsize, gpu_bytes) if shared else 0,
        server_runtime=SERVER_RUNTIME_BYTES if shared else 0,
        export=_export_bytes(stage, rollout.sglang if served else None, itemsize),
        scoring=scoring,
    )


def _head_bytes(config: Config, shape: ModelShape, tokens: int, response_tokens: int, itemsize: int) -> int:
    """Bytes of the head and the objective on the last stage."""
    fused, local_layers = config.algorithm.fused_linear, config.model.layer_spec == "local"
    vocabulary = shape.vocabulary // config.parallel.tensor
    # After the final norm, hidden states are gathered and the rows of response tokens selected; both have a gradient.
    hidden = 2 * (tokens + response_tokens) * shape.hidden * itemsize
    logits = response_tokens * vocabulary * itemsize
    weight_gradient = 0 if config.lora.rank else vocabulary * shape.hidden * itemsize
    if fused:
        # One chunk of logits, and the tensor that megatron-core's hook receives in place of the weight's gradient,
        # which went straight into the gradient buffer.
        return hidden + min(DEFAULT_CHUNK_BYTES["cuda"], logits) + weight_gradient
    # The operator writes the gradient over the logits. Local layers hold that of the weight before it is added.
    return hidden + logits + (weight_gradient if local_layers else 0)


def _cache_bytes(shape: ModelShape, stage: Stage, config: Config, itemsize: int, data_parallel: int) -> int:
    """Bytes of the local engine's key/value cache and, on the last stage, of its float32 logits."""
    sequences = local_batch(config, data_parallel)
    elements = sequences * longest_sequence(config) * stage.layers * (shape.key + shape.value)
    cache = elements // config.parallel.tensor * itemsize
    if stage.index == config.parallel.pipeline - 1:
        cache += sequences * shape.vocabulary * 4
    return cache


def _server_bytes(shape: ModelShape, config: Config, itemsize: int, gpu_bytes: float) -> int:
    """Bytes that a server keeps on a GPU for weights and cache."""
    fraction = memory_fraction(config)
    return weight_bytes(shape, config, itemsize) if fraction is None else int(fraction * gpu_bytes)


def _export_bytes(stage: Stage, sglang: SGLangConfig | None, itemsize: int) -> int:
    """Bytes of a weight export; `sglang` is the section of the servers that receive the weights, if there are any."""
    tensor = stage.largest_tensor * itemsize
    gathered = 2 * tensor
    if sglang is None or sglang.weight_sync in ("disk", "delta") or stage.index > 0:
        return gathered
    # Processes on the first stage send buckets. Two buffers take turns, and each holds the largest tensor.
    return gathered + 2 * max((sglang.bucket_mb or 1024) * 1024**2, tensor)
