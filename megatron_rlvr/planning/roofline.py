"""Seconds of a step from a roofline: what compute, memory and network allow at stated rates. Computed, not measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from megatron_rlvr.config import Config
from megatron_rlvr.megatron.stage_shapes import ModelShape, Stage
from megatron_rlvr.planning.batch import microbatches
from megatron_rlvr.rollout.engines.sglang.launch_arguments import ServerLayout


@dataclass(frozen=True)
class Hardware:
    """One GPU and its links: peak rates, and the shares of them that are assumed to be reached.

    The peaks are those of the H100 SXM data sheet: dense bfloat16, HBM3, NVLink 4 in one direction, one 400 Gb/s port
    per GPU.
    """

    name: str = "H100 SXM 80 GB"
    memory_bytes: float = 80e9
    flops: float = 989e12
    """Floating-point operations per second."""
    memory_rate: float = 3.35e12
    """Bytes per second, like the other rates."""
    nvlink_rate: float = 450e9
    network_rate: float = 50e9
    disk_rate: float = 2e9
    """Rate of a shared file system, for one writer or one reader. Assumed."""
    compute_share: float = 0.40
    memory_share: float = 0.60
    link_share: float = 0.70

    @property
    def reached_flops(self) -> float:
        return self.flops * self.compute_share

    @property
    def reached_memory_rate(self) -> float:
        return self.memory_rate * self.memory_share

    def reached_link_rate(self, within_node: bool) -> float:
        """Bytes per second between GPUs of one node, or of several."""
        return (self.nvlink_rate if within_node else self.network_rate) * self.link_share


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step by phase, for responses of `response_tokens` each."""

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
    def seconds_by_phase(self) -> dict[str, float]:
        """The phases, which add up to the step."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "response_tokens"}

    @property
    def total(self) -> float:
        return sum(self.seconds_by_phase.values())

    @property
    def dominant(self) -> str:
        """The longest phase."""
        phases = self.seconds_by_phase
        return max(phases, key=lambda name: phases[name])


@dataclass(frozen=True)
class Job:
    """Everything that the time of a step depends on.

    Attributes:
        config: the configuration, with every ``auto`` resolved.
        shape: the model's dimensions.
        stages: the pipeline stages.
        itemsize: bytes per element of weights and activations.
        data_parallel: number of data-parallel ranks.
        gpus_per_node: number of GPUs that NVLink connects.
        hardware: rates and memory of a GPU.
        response_share: mean length of prompts and responses, as a share of the greatest.
    """

    config: Config
    shape: ModelShape
    stages: Sequence[Stage]
    itemsize: int
    data_parallel: int
    gpus_per_node: int
    hardware: Hardware
    response_share: float

    @property
    def sequences(self) -> float:
        """Sequences of a step on one data-parallel rank."""
        rollout = self.config.rollout
        return rollout.prompts_per_step * rollout.samples_per_prompt / self.data_parallel

    @property
    def response_tokens(self) -> float:
        return self.config.rollout.max_tokens * self.response_share

    @property
    def prompt_tokens(self) -> float:
        return self.config.data.max_prompt_tokens * self.response_share

    @property
    def sequence_tokens(self) -> float:
        return self.prompt_tokens + self.response_tokens

    @property
    def stage_ranks(self) -> int:
        """Ranks of a pipeline stage in one data-parallel rank."""
        return self.config.parallel.tensor * self.config.parallel.context

    @property
    def model_ranks(self) -> int:
        """Ranks of one data-parallel rank."""
        return self.stage_ranks * self.config.parallel.pipeline

    @property
    def nodes(self) -> int:
        return -(-self.data_parallel * self.model_ranks // self.gpus_per_node)

    @property
    def stage_parameters(self) -> int:
        """Parameters of a rank of the largest stage."""
        return max(stage.count for stage in self.stages)

    @property
    def cache_bytes_per_token(self) -> int:
        """Keys and values of one token in all layers."""
        return self.shape.layers * 2 * self.shape.key_value * self.itemsize

    @property
    def forward_flops(self) -> float:
        """Operations of one forward pass over all sequences of a step, on one rank. Attention is causal."""
        width, shape = self.sequence_tokens, self.shape
        per_token = 2 * shape.active + 2 * shape.layers * shape.query * width
        return self.sequences * width * per_token / self.model_ranks

    @property
    def backward_and_recomputation(self) -> int:
        """Forward passes that the backward pass costs: two, and one more under full recomputation."""
        return 3 if self.config.parallel.recompute == "full" else 2

    @property
    def bubble(self) -> float:
        """The factor by which the pipeline's bubble stretches a pass."""
        parallel = self.config.parallel
        count = microbatches(self.config, self.data_parallel).count
        return 1 + (parallel.pipeline - 1) / (count * parallel.virtual_pipeline)

    def link_rate(self, ranks: int) -> float:
        """Bytes per second within a group of neighbouring ranks."""
        return self.hardware.reached_link_rate(ranks <= self.gpus_per_node)


def step_time(job: Job) -> StepTime:
    """Time of a step in which every group has a gradient.

    Scoring is one forward pass. The update is three, or four with full recomputation, ``epochs`` times. Both are
    stretched by the pipeline's bubble.
    """
    algorithm = job.config.algorithm
    compute = job.forward_flops * job.bubble / job.hardware.reached_flops
    generate = _server_generation_time(job) if job.config.rollout.engine == "sglang" else _local_generation_time(job)
    return StepTime(
        response_tokens=job.response_tokens,
        generate=generate,
        score=compute,
        update=(1 + job.backward_and_recomputation) * compute * algorithm.epochs,
        tensor_parallel=_tensor_exchange_time(job) * job.bubble,
        expert_parallel=_expert_exchange_time(job) * job.bubble,
        context_parallel=_context_exchange_time(job) * job.bubble,
        data_parallel=_gradient_exchange_time(job),
        optimizer=_optimizer_time(job),
        weight_sync=_weight_sync_time(job),
    )


def _local_generation_time(job: Job) -> float:
    """Generation by the training ranks: a batch ends with its longest response, and pipeline stages take turns.

    Each decoding step reads the weights, and every token reads the cache of the tokens before it.
    """
    parallel, rollout = job.config.parallel, job.config.rollout
    weights = job.stage_parameters * job.itemsize
    mean_tokens = job.prompt_tokens + job.response_tokens / 2
    cache = job.sequences * mean_tokens * job.cache_bytes_per_token / job.model_ranks
    batches = max(1.0, job.sequences / rollout.local_batch)
    read = parallel.pipeline * (rollout.max_tokens * batches * weights + job.response_tokens * cache)
    # Decoding many sequences at once is limited by compute.
    compute = job.forward_flops * parallel.pipeline / job.hardware.reached_flops
    return max(read / job.hardware.reached_memory_rate, compute)


def _server_generation_time(job: Job) -> float:
    """Generation by SGLang servers on the same number of GPUs. Each replica generates its share of the sequences.

    The pipeline stages of a server take turns, so a decoding step takes as long as reading the weights of one
    tensor-parallel shard.
    """
    rollout = job.config.rollout
    server = ServerLayout.from_arguments(rollout.sglang.server)
    sequences = job.sequences * server.gpus_per_replica / job.model_ranks
    weights = job.shape.parameters * job.itemsize
    cache = sequences * (job.prompt_tokens + job.response_tokens / 2) * job.cache_bytes_per_token
    read = rollout.max_tokens * weights / server.tensor + job.response_tokens * cache / server.gpus_per_replica
    return max(read / job.hardware.reached_memory_rate, job.forward_flops / job.hardware.reached_flops)


def _layer_tokens(job: Job) -> float:
    """Tokens of a step times layers, on one rank and before tensor parallelism splits anything."""
    parallel = job.config.parallel
    return job.sequences * job.sequence_tokens * job.shape.layers / parallel.pipeline / parallel.context


def _exchanging_passes(job: Job) -> int:
    """Passes of a step in which layers exchange activations: the scoring pass, and those of the update."""
    return 1 + job.backward_and_recomputation * job.config.algorithm.epochs


def _tensor_exchange_time(job: Job) -> float:
    """Two all-gathers and two reduce-scatters (or two all-reduces) of the hidden states per layer and pass."""
    tensor = job.config.parallel.tensor
    moved = _exchanging_passes(job) * 4 * _layer_tokens(job) * job.shape.hidden * job.itemsize
    return moved * (tensor - 1) / tensor / job.link_rate(tensor)


def _expert_exchange_time(job: Job) -> float:
    """Every token is sent to the ranks of its experts and back, per layer and pass."""
    parallel, shape = job.config.parallel, job.shape
    tokens = _layer_tokens(job) / parallel.tensor
    sent = tokens * shape.chosen * shape.hidden * job.itemsize * (parallel.expert - 1) / parallel.expert
    return _exchanging_passes(job) * 2 * sent / job.link_rate(parallel.expert * parallel.expert_tensor)


def _context_exchange_time(job: Job) -> float:
    """Keys and values of a sequence are gathered by all ranks that share it, per layer and pass."""
    parallel = job.config.parallel
    key_value_bytes = 2 * job.shape.key_value * job.itemsize / parallel.tensor
    gathered = _layer_tokens(job) * (parallel.context - 1) * key_value_bytes
    return _exchanging_passes(job) * gathered / job.link_rate(job.stage_ranks)


def _gradient_exchange_time(job: Job) -> float:
    """Float32 gradients are reduced per optimizer step; the distributed optimizer gathers the weights afterwards."""
    parallel, algorithm = job.config.parallel, job.config.algorithm
    ranks = job.data_parallel * parallel.context
    bytes_per_parameter = 4 + (job.itemsize if parallel.distributed_optimizer else 4)
    moved = bytes_per_parameter * job.stage_parameters * (ranks - 1) / ranks
    rate = job.link_rate(job.data_parallel * job.model_ranks)
    return algorithm.minibatches * algorithm.epochs * moved / rate


def _optimizer_time(job: Job) -> float:
    """Adam reads gradient, master weight and moments, and writes the last three and the weight: 30 bytes in all."""
    parallel, algorithm = job.config.parallel, job.config.algorithm
    shards = job.data_parallel * parallel.context if parallel.distributed_optimizer else 1
    moved = 30 * job.stage_parameters / shards
    return algorithm.minibatches * algorithm.epochs * moved / job.hardware.reached_memory_rate


def _weight_sync_time(job: Job) -> float:
    """Seconds from the last update until all SGLang servers hold the weights; 0 for the local engine.

    Weights travel one after the other: from their pipeline stage to the others, from their tensor- and expert-parallel
    shards to all of these, into a bucket, and on to the servers. Overhead per request and bucket is left out.
    """
    parallel, hardware, shape = job.config.parallel, job.hardware, job.shape
    if job.config.rollout.engine != "sglang":
        return 0.0
    weights = shape.parameters * job.itemsize
    between_stages = 0.0
    if parallel.pipeline > 1:
        between_stages = weights / parallel.tensor / hardware.reached_link_rate(within_node=job.nodes == 1)
    gathering = weights * (parallel.tensor - 1) / parallel.tensor / job.link_rate(parallel.tensor)
    if parallel.expert > 1:
        experts = job.itemsize * shape.layers * shape.experts * 3 * shape.hidden * shape.expert_feed_forward
        rate = job.link_rate(parallel.expert * parallel.expert_tensor)
        gathering += experts * (parallel.expert - 1) / parallel.expert / rate
    copying = 2 * weights / hardware.reached_memory_rate
    return between_stages + gathering + copying + _sending_time(job, weights)


def _sending_time(job: Job, weights: int) -> float:
    """Seconds that `weights` bytes take from the main process to all servers."""
    sglang, hardware = job.config.rollout.sglang, job.hardware
    transport = planned_weight_sync(sglang.weight_sync, job.nodes)
    if transport == "tensor":  # every replica on the node reads the main process's GPU
        replicas = sglang.servers * ServerLayout.from_arguments(sglang.server).replicas
        return replicas * weights / hardware.reached_link_rate(within_node=True)
    if transport == "distributed":  # a broadcast crosses each link once
        return weights / hardware.reached_link_rate(within_node=False)
    return 2 * weights / hardware.disk_rate  # written by one process, then read by all servers at once


def planned_weight_sync(weight_sync: str, nodes: int) -> str:
    """How servers receive weights on `nodes` nodes: ``tensor``, ``distributed`` or ``disk``.

    Only servers on the main process's machine can use shared memory, so on several nodes a broadcast replaces it.
    """
    return "distributed" if weight_sync == "tensor" and nodes > 1 else weight_sync
