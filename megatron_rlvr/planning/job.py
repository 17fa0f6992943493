"""What the time of a step depends on: the rates of the hardware, and the sizes of a job."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_rlvr.config import Config
from megatron_rlvr.megatron.stage_shapes import ModelShape, Stage
from megatron_rlvr.planning.batch import microbatches
from megatron_rlvr.planning.servers import Servers, cache_bytes_per_token

MEASURED_UTILISATION = 0.23
"""Share of the bfloat16 peak that was measured: training and log-probs of Llama 3.1 70B on 64 H100 in NeMo-RL, from the
seconds in its issue 959 (2,048 sequences of 530 tokens, 6 operations per parameter and token, 31 s)."""
ASSUMED_UTILISATION = 0.40
"""Share of the peak that well-tuned pretraining reaches with long sequences; assumed, for comparison."""


@dataclass(frozen=True)
class Hardware:
    """One GPU and its links: peak rates, and the shares of them that are assumed to be reached.

    The peaks are those of the H100 SXM data sheet: dense bfloat16, HBM3, NVLink 4 and PCIe 5 in one direction, one
    400 Gb/s port per GPU.
    """

    name: str = "H100 SXM 80 GB"
    memory_bytes: float = 80e9
    flops: float = 989e12
    """Floating-point operations per second."""
    memory_rate: float = 3.35e12
    """Bytes per second, like the other rates."""
    nvlink_rate: float = 450e9
    network_rate: float = 50e9
    host_rate: float = 64e9
    """Rate between the memory of a GPU and page-locked host memory."""
    disk_rate: float = 2e9
    """Rate of a shared file system, for one writer or one reader. Assumed."""
    host_memory_rate: float = 30e9
    """Rate of host memory for the process of one GPU. Assumed."""
    compute_share: float = MEASURED_UTILISATION
    memory_share: float = 0.60
    link_share: float = 0.70

    @property
    def reached_flops(self) -> float:
        return self.flops * self.compute_share

    @property
    def reached_memory_rate(self) -> float:
        return self.memory_rate * self.memory_share

    @property
    def reached_host_rate(self) -> float:
        return self.host_rate * self.link_share

    def reached_link_rate(self, within_node: bool) -> float:
        """Bytes per second between GPUs of one node, or of several."""
        return (self.nvlink_rate if within_node else self.network_rate) * self.link_share


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
        servers: where the SGLang servers run.
        cached_tokens: tokens whose keys and values one replica of a server holds; infinite if unknown.
        hardware: rates and memory of a GPU.
        response_share: mean length of prompts and responses, as a share of the greatest.
    """

    config: Config
    shape: ModelShape
    stages: Sequence[Stage]
    itemsize: int
    data_parallel: int
    gpus_per_node: int
    servers: Servers
    cached_tokens: float
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
    def stage_trained(self) -> int:
        """Trained parameters of a rank of the stage with the most."""
        return max(stage.trained for stage in self.stages)

    @property
    def training_gpus(self) -> int:
        return self.data_parallel * self.model_ranks

    @property
    def server_gpus(self) -> int:
        """GPUs that generate: those that train, or those of the nodes with servers."""
        return self.servers.nodes * self.gpus_per_node or self.training_gpus

    @property
    def cache_bytes_per_token(self) -> int:
        """What servers, or the local engine, cache of one token in all layers."""
        if self.config.rollout.engine == "sglang":
            return cache_bytes_per_token(self.shape, self.itemsize)
        return self.shape.layers * (self.shape.key + self.shape.value) * self.itemsize

    @property
    def forward_flops(self) -> float:
        """Operations of one forward pass over all sequences of a step, on one rank. Attention is causal."""
        width, shape = self.sequence_tokens, self.shape
        per_token = 2 * (shape.active + shape.adapters) + shape.layers * (shape.query + shape.attended) * width
        return self.sequences * width * per_token / self.model_ranks

    @property
    def backward_and_recomputation(self) -> int:
        """Forward passes that the backward pass costs: two, and one more under full recomputation.

        Frozen weights need no gradient, which is one of the two.
        """
        return (1 if self.config.lora.rank else 2) + (1 if self.config.parallel.recompute == "full" else 0)

    @property
    def update_passes(self) -> int:
        """Passes of an update through the layers: forward, backward, and one more under full recomputation."""
        return 3 if self.config.parallel.recompute == "full" else 2

    @property
    def bubble(self) -> float:
        """The factor by which the pipeline's bubble, and a stage with more layers than others, stretch a pass."""
        parallel = self.config.parallel
        count = microbatches(self.config, self.data_parallel).count
        largest = max(stage.layers for stage in self.stages) * parallel.pipeline / self.shape.layers
        return largest * (1 + (parallel.pipeline - 1) / (count * parallel.virtual_pipeline))

    def link_rate(self, ranks: int) -> float:
        """Bytes per second within a group of neighbouring ranks."""
        return self.hardware.reached_link_rate(ranks <= self.gpus_per_node)
