"""Seconds of generation: by the training ranks, or by SGLang servers whose cache may hold only some sequences."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_rlvr.planning.job import Job
from megatron_rlvr.planning.servers import cache_copies, served_bytes
from megatron_rlvr.rollout.engines.sglang.launch_arguments import ServerLayout


@dataclass(frozen=True)
class ServerLoad:
    """Sequences of a step on one replica of a server.

    Attributes:
        sequences: sequences that the replica generates in a step.
        concurrent: sequences that its cache holds at once, each at half of its response; at most `sequences`.
    """

    sequences: float
    concurrent: float

    @property
    def waves(self) -> float:
        """How often the cache is filled in a step."""
        return self.sequences / self.concurrent


def local_generation_time(job: Job) -> float:
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


def server_load(job: Job) -> ServerLoad:
    """Return how many sequences a replica generates, and how many of them at once."""
    gpus = ServerLayout.from_arguments(job.config.rollout.sglang.server).gpus_per_replica
    sequences = job.sequences * job.data_parallel * gpus / job.server_gpus
    held = job.cached_tokens / (job.prompt_tokens + job.response_tokens / 2)
    return ServerLoad(sequences, max(1.0, min(sequences, held)))


def server_generation_time(job: Job) -> float:
    """Generation by SGLang servers. Each replica generates its share of the sequences, in waves.

    A wave is as many sequences as the cache holds. As one ends, another begins, so a wave takes the mean response, but
    the last one takes the longest. A decoding step reads the weights of one tensor-parallel shard in every pipeline
    stage, and every token reads the cache of the tokens before it.
    """
    server = ServerLayout.from_arguments(job.config.rollout.sglang.server)
    load = server_load(job)
    steps = job.config.rollout.max_tokens + (load.waves - 1) * job.response_tokens
    weights = served_bytes(job.shape, job.config, job.itemsize)
    copies = cache_copies(job.shape, server)
    cache = load.sequences * (job.prompt_tokens + job.response_tokens / 2) * job.cache_bytes_per_token * copies
    read = steps * weights / server.tensor + job.response_tokens * cache / server.gpus_per_replica
    compute = job.forward_flops * job.training_gpus / job.server_gpus / job.hardware.reached_flops
    return max(read / job.hardware.reached_memory_rate, compute)
