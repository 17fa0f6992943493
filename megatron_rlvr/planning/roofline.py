"""Seconds of a step from a roofline: what compute, memory and network allow at stated rates. Computed, not measured."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_rlvr.config import Config
from megatron_rlvr.megatron.stage_shapes import ModelShape, Stage
from megatron_rlvr.planning.memory import microbatch, weight_sync
from megatron_rlvr.rollout.engines.sglang.launch_arguments import ServerLayout


@dataclass(frozen=True)
class Hardware:
    """One GPU and its links, with the shares of the peak that are assumed to be reached.

    The peaks are those of the H100 SXM data sheet: dense bfloat16, HBM3, NVLink 4 one way, one 400 Gb/s port a GPU.
    """

    name: str = "H100 SXM 80 GB"
    memory_bytes: float = 80e9
    flops: float = 989e12
    memory_rate: float = 3.35e12
    nvlink_rate: float = 450e9
    network_rate: float = 50e9
    disk_rate: float = 2e9
    """of a shared file system, for one writer or one reader; assumed"""
    compute_share: float = 0.40
    memory_share: float = 0.60
    link_share: float = 0.70


@dataclass(frozen=True)
class StepTime:
    """Seconds of one rollout step by phase; the responses have `response_tokens` each."""

    response_tokens: float
    generate: float
    score: float
    update: float
    tensor_parallel: float
    expert_parallel: float
    context_parallel: float
    data_parallel: float
    optimizer: float
    weight_sync: float

    @property
    def parts(self) -> dict[str, float]:
        """Seconds by phase, which add up to the step."""
        return {name: getattr(self, name) for name in _PARTS}

    @property
    def total(self) -> float:
        return sum(self.parts.values())

    @property
    def dominant(self) -> str:
        return max(_PARTS, key=lambda name: getattr(self, name))


_PARTS = (
    "generate",
    "score",
    "update",
    "tensor_parallel",
    "expert_parallel",
    "context_parallel",
    "data_parallel",
    "optimizer",
    "weight_sync",
)


def step_time(
    shape: ModelShape,
    stages: list[Stage],
    config: Config,
    itemsize: int,
    data_parallel: int,
    gpus_per_node: int,
    hardware: Hardware,
    response_share: float,
) -> StepTime:
    """Time of a step whose responses have `response_share` of the longest length, every group with a gradient.

    Generation: a batch ends with its longest response, and each of its steps reads the weights; every token reads the
    cache so far; pipeline stages take turns. Scoring is one forward pass, the update three, or four with full
    recomputation, `epochs` times, stretched by the pipeline's bubble; attention is causal.
    """
    parallel, rollout, algorithm = config.parallel, config.rollout, config.algorithm
    sequences = rollout.prompts_per_step * rollout.samples_per_prompt / data_parallel
    response = rollout.max_tokens * response_share
    prompt = config.data.max_prompt_tokens * response_share
    width = prompt + response
    stage_ranks = parallel.tensor * parallel.context
    model_ranks = stage_ranks * parallel.pipeline
    flops, memory = hardware.flops * hardware.compute_share, hardware.memory_rate * hardware.memory_share

    forward = sequences * width * (2 * shape.active + 2 * shape.layers * shape.query * width) / model_ranks
    _, microbatches = microbatch(config, data_parallel)
    bubble = 1 + (parallel.pipeline - 1) / (microbatches * parallel.virtual_pipeline)
    weights = max(stage.count for stage in stages) * itemsize
    cache = sequences * (prompt + response / 2) * shape.layers * 2 * shape.key_value * itemsize / model_ranks
    batches = max(1.0, sequences / rollout.local_batch)
    decode = parallel.pipeline * (rollout.max_tokens * batches * weights + response * cache) / memory
    # enough sequences at once make decoding compute-bound
    generate = max(decode, forward * parallel.pipeline / flops)
    if rollout.engine == "sglang":
        # The servers have their own layout on as many GPUs; each replica generates its share of the sequences. Pipeline
        # stages take turns: a decoding step lasts as long as it takes to read the weights of one tensor-parallel shard.
        server = ServerLayout.from_arguments(rollout.sglang.server)
        served = sequences * server.gpus_per_replica / model_ranks
        cache = served * (prompt + response / 2) * shape.layers * 2 * shape.key_value * itemsize
        weight_reads = rollout.max_tokens * shape.parameters * itemsize / server.tensor
        decode = (weight_reads + response * cache / server.gpus_per_replica) / memory
        generate = max(decode, forward / flops)

    tensor_rate = hardware.nvlink_rate if parallel.tensor <= gpus_per_node else hardware.network_rate
    again = 1 if parallel.recompute == "full" else 0
    passes = 1 + (2 + again) * algorithm.epochs
    layer_tokens = sequences * width * shape.layers / parallel.pipeline / parallel.context
    moved = passes * 4 * layer_tokens * shape.hidden * itemsize
    exchange = moved * (parallel.tensor - 1) / parallel.tensor / (tensor_rate * hardware.link_share)

    # A token goes to the ranks of its experts and comes back; keys and values of a sequence go to all that share it.
    group = parallel.expert * parallel.expert_tensor
    expert_rate = (hardware.nvlink_rate if group <= gpus_per_node else hardware.network_rate) * hardware.link_share
    sent = layer_tokens / parallel.tensor * shape.chosen * shape.hidden * itemsize * (parallel.expert - 1)
    experts = passes * 2 * sent / parallel.expert / expert_rate
    context_rate = hardware.nvlink_rate if stage_ranks <= gpus_per_node else hardware.network_rate
    gathered = layer_tokens * (parallel.context - 1) * 2 * shape.key_value * itemsize / parallel.tensor
    context = passes * gathered / (context_rate * hardware.link_share)

    updates = algorithm.minibatches * algorithm.epochs
    mine = max(stage.count for stage in stages)
    inside = data_parallel * model_ranks <= gpus_per_node
    data_rate = (hardware.nvlink_rate if inside else hardware.network_rate) * hardware.link_share
    ranks = data_parallel * parallel.context
    a_reduction = (4 + (itemsize if parallel.distributed_optimizer else 4)) * mine * (ranks - 1) / ranks
    shards = ranks if parallel.distributed_optimizer else 1
    return StepTime(
        response_tokens=response,
        generate=generate,
        score=forward * bubble / flops,
        update=(3 + again) * forward * algorithm.epochs * bubble / flops,
        tensor_parallel=exchange * bubble,
        expert_parallel=experts * bubble,
        context_parallel=context * bubble,
        data_parallel=updates * a_reduction / data_rate,
        # reads gradient, master and moments, writes them and the weight
        optimizer=updates * 30 * mine / shards / memory,
        weight_sync=weight_sync_time(shape, config, itemsize, data_parallel, gpus_per_node, hardware),
    )


def weight_sync_time(
    shape: ModelShape, config: Config, itemsize: int, data_parallel: int, gpus_per_node: int, hardware: Hardware
) -> float:
    """Seconds from the last update until all SGLang servers hold the weights; 0 for the local engine, which holds them.

    Every weight goes, one after the other: from its pipeline stage to the others, from its tensor- and expert-parallel
    parts to all of them, into a bucket, and on. Through shared memory every server of the node reads the main process's
    GPU; a broadcast passes through each link once; a folder is written by one process and read by all servers at once.
    What a request or a bucket costs beside its bytes is left out.
    """
    parallel = config.parallel
    if config.rollout.engine != "sglang":
        return 0.0
    world = data_parallel * parallel.tensor * parallel.context * parallel.pipeline
    nodes = -(-world // gpus_per_node)
    whole = shape.parameters * itemsize
    nvlink, network = hardware.nvlink_rate * hardware.link_share, hardware.network_rate * hardware.link_share
    stages = whole / parallel.tensor / (network if nodes > 1 else nvlink) if parallel.pipeline > 1 else 0.0
    parts = whole * (parallel.tensor - 1) / parallel.tensor / (nvlink if parallel.tensor <= gpus_per_node else network)
    if parallel.expert > 1:
        experts = itemsize * shape.layers * shape.experts * 3 * shape.hidden * shape.expert_feed_forward
        group = parallel.expert * parallel.expert_tensor
        parts += experts * (parallel.expert - 1) / parallel.expert / (nvlink if group <= gpus_per_node else network)
    copy = 2 * whole / (hardware.memory_rate * hardware.memory_share)
    way = weight_sync(config, nodes)
    if way == "tensor":
        sent = config.rollout.sglang.servers * whole / nvlink
    elif way == "distributed":
        sent = whole / network
    else:
        sent = 2 * whole / hardware.disk_rate
    return stages + parts + copy + sent
