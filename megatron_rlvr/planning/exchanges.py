"""Seconds that a step spends on messages between ranks, on the optimizer, and on the way of weights to the servers."""

from __future__ import annotations

from megatron_rlvr.planning.job import Job
from megatron_rlvr.planning.servers import served_bytes

CHANGED_SHARE = 0.05
"""Share of the elements that change in a step with ``weight_sync: delta``. Assumed; runs record theirs."""


def _layer_tokens(job: Job) -> float:
    """Tokens of a step times layers, on one rank and before tensor parallelism splits anything."""
    parallel = job.config.parallel
    return job.sequences * job.sequence_tokens * job.shape.layers / parallel.pipeline / parallel.context


def _exchanging_passes(job: Job) -> int:
    """Passes of a step in which layers exchange activations: scoring, also of a reference, and those of the update."""
    algorithm = job.config.algorithm
    return 1 + (algorithm.kl_coefficient > 0) + job.update_passes * algorithm.epochs


def tensor_exchange_time(job: Job) -> float:
    """Two all-gathers and two reduce-scatters (or two all-reduces) of the hidden states per layer and pass."""
    tensor = job.config.parallel.tensor
    moved = _exchanging_passes(job) * 4 * _layer_tokens(job) * job.shape.hidden * job.itemsize
    return moved * (tensor - 1) / tensor / job.link_rate(tensor)


def expert_exchange_time(job: Job) -> float:
    """Every token is sent to the ranks of its experts and back, per layer and pass."""
    parallel, shape = job.config.parallel, job.shape
    tokens = _layer_tokens(job) / parallel.tensor * (shape.mixtures / shape.layers)
    sent = tokens * shape.chosen * shape.hidden * job.itemsize * (parallel.expert - 1) / parallel.expert
    return _exchanging_passes(job) * 2 * sent / job.link_rate(parallel.expert * parallel.expert_tensor)


def context_exchange_time(job: Job) -> float:
    """Keys and values of a sequence are gathered by all ranks that share it, per layer and pass."""
    parallel = job.config.parallel
    key_value_bytes = (job.shape.key + job.shape.value) * job.itemsize / parallel.tensor
    gathered = _layer_tokens(job) * (parallel.context - 1) * key_value_bytes
    return _exchanging_passes(job) * gathered / job.link_rate(job.stage_ranks)


def gradient_exchange_time(job: Job) -> float:
    """Float32 gradients are reduced per optimizer step; the distributed optimizer gathers the weights afterwards."""
    parallel, algorithm = job.config.parallel, job.config.algorithm
    ranks = job.data_parallel * parallel.context
    bytes_per_parameter = 4 + (job.itemsize if parallel.distributed_optimizer else 4)
    moved = bytes_per_parameter * job.stage_trained * (ranks - 1) / ranks
    rate = job.link_rate(job.data_parallel * job.model_ranks)
    return algorithm.minibatches * algorithm.epochs * moved / rate


def optimizer_time(job: Job) -> float:
    """Adam reads gradient, master weight and moments, and writes the last three and the weight: 30 bytes in all.

    The share of its state that is offloaded is updated in host memory.
    """
    parallel, algorithm = job.config.parallel, job.config.algorithm
    shards = job.data_parallel * parallel.context if parallel.distributed_optimizer else 1
    moved = 30 * job.stage_trained / shards
    offloaded = job.config.optimizer.cpu_offload
    seconds_per_byte = (1 - offloaded) / job.hardware.reached_memory_rate + offloaded / job.hardware.host_memory_rate
    return algorithm.minibatches * algorithm.epochs * moved * seconds_per_byte


def weight_sync_time(job: Job) -> float:
    """Seconds from the last update until all SGLang servers hold the weights; 0 for the local engine.

    Weights travel one after the other: from their pipeline stage to the others, from their tensor- and expert-parallel
    shards to all of these, into a bucket, and on to the servers. Every node with a server does this for itself, at the
    same time as the others. Overhead per request and bucket is left out.
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
        experts = job.itemsize * shape.mixtures * shape.experts * 3 * shape.hidden * shape.expert_feed_forward
        rate = job.link_rate(parallel.expert * parallel.expert_tensor)
        gathering += experts * (parallel.expert - 1) / parallel.expert / rate
    served = served_bytes(shape, job.config, job.itemsize)
    copying = (weights + served) / hardware.reached_memory_rate  # read, quantized if need be, and written
    return between_stages + gathering + copying + _sending_time(job, served)


def _sending_time(job: Job, weights: int) -> float:
    """Seconds that `weights` bytes take from the ranks that gathered them to all servers."""
    sglang, hardware = job.config.rollout.sglang, job.hardware
    if sglang.weight_sync == "tensor":  # every rank hands them to the server's process on its own GPU, which copies
        return 2 * weights / hardware.reached_memory_rate
    if sglang.weight_sync == "distributed":  # a broadcast crosses each link once
        return weights / hardware.reached_link_rate(within_node=False)
    if sglang.weight_sync == "delta":
        # The main process compares new weights with its copy (2 passes through host memory) and applies the delta to
        # the copy (2), then the other nodes do (2), and the servers read their node's copy (1).
        in_host_memory = 7 * weights / hardware.host_memory_rate
        # A gap of one byte and a value of two, for each changed element of two bytes.
        on_disk = 1.5 * CHANGED_SHARE * weights + weights / sglang.full_sync_every
        return in_host_memory + 2 * on_disk / hardware.disk_rate
    return 2 * weights / hardware.disk_rate  # written by one process, then read by all servers at once
