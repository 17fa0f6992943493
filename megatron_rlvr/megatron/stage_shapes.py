"""The parameters of every pipeline stage of a layout, built by megatron-core on the meta device.

A fake process group answers for the whole job in one process, so the model that is counted is the one that a rank of
the real job would build.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_rlvr.config import Config
from megatron_rlvr.errors import UserError
from megatron_rlvr.megatron.bridge import PolicyBridge
from megatron_rlvr.megatron.huggingface_config import is_tied
from megatron_rlvr.megatron.parallel import initialize_model_parallel


@dataclass(frozen=True)
class Stage:
    """What one rank of a pipeline stage holds.

    Attributes:
        index: of the stage; `layers` transformer layers are on it.
        parameters: element count of every parameter, in megatron-core's order of its buffers (last one first).
        experts: the same of the experts' parameters, which have buffers and data-parallel ranks of their own.
        shared_embedding: elements of the tied embedding, which the first and the last stage both hold, or 0.
        largest_tensor: elements of the largest Hugging Face tensor, whole, that an export of the stage gathers.
    """

    index: int
    layers: int
    parameters: tuple[int, ...]
    experts: tuple[int, ...]
    shared_embedding: int
    largest_tensor: int

    @property
    def count(self) -> int:
        return sum(self.parameters) + sum(self.experts)


@dataclass(frozen=True)
class ModelShape:
    """The sizes that activations and times depend on; `parameters` of the whole model, a tied embedding once."""

    layers: int
    hidden: int
    query: int
    """attention heads x head size"""
    key_value: int
    """key/value heads x head size"""
    heads: int
    feed_forward: int
    vocabulary: int
    positions: int
    """the longest sequence that the model was made for"""
    query_norm: bool
    parameters: int
    active: int
    """parameters that compute on one token: of the experts those that are chosen"""
    experts: int = 0
    """experts of a layer; 0 for a dense model"""
    chosen: int = 0
    """experts of a token"""
    expert_feed_forward: int = 0


def model_stages(config: Config, world_size: int) -> tuple[ModelShape, torch.dtype, list[Stage]]:
    """Build a rank of every pipeline stage of a job of `world_size` processes, on the meta device.

    Raises:
        UserError: when the layout does not divide the job or the model.
    """
    parallel = config.parallel
    for names in (("tensor", "pipeline", "context"), ("expert_tensor", "expert", "pipeline")):
        product = math.prod(getattr(parallel, name) for name in names)
        if world_size % product:
            raise UserError(
                f"{' x '.join(f'parallel.{name}' for name in names)} = {product} does not divide the {world_size} "
                "GPUs: change --nodes or lower one of the three"
            )
    # The job runs on GPUs: what `auto` would be there.
    dtype = "bfloat16" if config.model.dtype == "auto" else config.model.dtype
    model_config = replace(config.model, dtype=dtype, layer_spec="local", fp8="none")
    stages = []
    for index in range(parallel.pipeline):
        dist.init_process_group(
            "fake", store=FakeStore(), rank=index * (world_size // parallel.pipeline), world_size=world_size
        )
        try:
            initialize_model_parallel(parallel, create_gloo_groups=False)
            bridge = PolicyBridge(config.model.path, model_config, parallel)
            parts = bridge.build(shapes_only=True)
            named = [(f"{i}.{name}", p) for i, part in enumerate(parts) for name, p in part.named_parameters()]
            experts = {n for n, p in named if not getattr(p, "allreduce", True)}
            split = {n: parallel.tensor if getattr(p, "tensor_model_parallel", False) else 1 for n, p in named}
            split |= dict.fromkeys(experts, parallel.expert * parallel.expert_tensor)
            # mbridge gathers one megatron tensor: the embedding, gate and up projection as one, or one for each rank
            # of the experts.
            largest = max(p.numel() * split[name] for name, p in named)
            shared = [p.numel() for _, p in named if getattr(p, "shared_embedding", False)]
            stages.append(
                Stage(
                    index=index,
                    layers=sum(len(part.decoder.layers) for part in parts),
                    parameters=tuple(p.numel() for n, p in reversed(named) if n not in experts),
                    experts=tuple(p.numel() for n, p in reversed(named) if n in experts),
                    shared_embedding=shared[0] if shared else 0,
                    largest_tensor=largest,
                )
            )
            if index == 0:
                total = in_experts = 0
            total += sum(p.numel() * split[name] for name, p in named)
            in_experts += sum(p.numel() * split[name] for name, p in named if name in experts)
            if index and index == parallel.pipeline - 1 and shared:
                total -= shared[0] * parallel.tensor
        finally:
            parallel_state.destroy_model_parallel()
            dist.destroy_process_group()
    megatron = bridge.config
    total -= (
        (bridge.padded_vocabulary - bridge.vocab_size) * megatron.hidden_size * (1 if is_tied(bridge.hf_config) else 2)
    )
    shape = ModelShape(
        layers=megatron.num_layers,
        hidden=megatron.hidden_size,
        query=megatron.num_attention_heads * megatron.kv_channels,
        key_value=megatron.num_query_groups * megatron.kv_channels,
        heads=megatron.num_attention_heads,
        feed_forward=megatron.ffn_hidden_size,
        vocabulary=bridge.vocab_size,
        positions=bridge.hf_config.max_position_embeddings,
        query_norm=megatron.qk_layernorm,
        parameters=total,
        active=total - in_experts + in_experts * (megatron.moe_router_topk or 0) // (megatron.num_moe_experts or 1),
        experts=megatron.num_moe_experts or 0,
        chosen=megatron.moe_router_topk if megatron.num_moe_experts else 0,
        expert_feed_forward=megatron.moe_ffn_hidden_size if megatron.num_moe_experts else 0,
    )
    return shape, bridge.dtype, stages
