"""Parameter counts of every pipeline stage of a layout, from models built on the meta device.

A fake process group simulates the job in one process. megatron-core then builds the model that a rank of the real job
would build, so the counts are exact.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from torch.nn import Module
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_rlvr.megatron.bridge import PolicyBridge
from megatron_rlvr.megatron.config import LoRAConfig, ModelConfig, ParallelConfig
from megatron_rlvr.megatron.huggingface_config import is_tied
from megatron_rlvr.megatron.layout_checks import check_world_size
from megatron_rlvr.megatron.lora import layer_adapters
from megatron_rlvr.megatron.model import PolicyModel
from megatron_rlvr.megatron.parallel import initialize_model_parallel
from megatron_rlvr.megatron.weight_shards import ADAPTERS


@dataclass(frozen=True)
class AdaptedLayer:
    """The adapters of a linear layer, on one rank.

    Attributes:
        name: megatron-core's name of the layer, such as ``linear_qkv``.
        modules: Hugging Face modules with an adapter, of those that the layer computes.
        inputs, outputs: elements per token of the layer.
        routed: whether the layer belongs to an expert that a router chooses.
        splits_tokens: whether tensor-parallel ranks divide the tokens of the product with A under sequence parallelism.
    """

    name: str
    modules: int
    inputs: int
    outputs: int
    routed: bool
    splits_tokens: bool


@dataclass(frozen=True)
class Stage:
    """The parameters of one rank of a pipeline stage.

    Attributes:
        index: index of the stage.
        layers: number of transformer layers of the stage.
        mixtures: how many of them have experts.
        parameters: elements of every trained parameter, in the order of megatron-core's buffers (last parameter first).
        experts: the same for parameters of experts, which have separate buffers and data-parallel ranks.
        shared_embedding: elements of the tied embedding, which both the first and the last stage have, or 0.
        largest_tensor: elements of the largest tensor that an export gathers from the ranks of the stage.
        frozen: elements of all parameters that are not trained.
        adapted: the adapters of a dense layer, and of one with experts.
    """

    index: int
    layers: int
    mixtures: int
    parameters: tuple[int, ...]
    experts: tuple[int, ...]
    shared_embedding: int
    largest_tensor: int
    frozen: int = 0
    adapted: tuple[tuple[AdaptedLayer, ...], tuple[AdaptedLayer, ...]] = ((), ())

    @property
    def trained(self) -> int:
        """Number of trained parameters of the rank."""
        return sum(self.parameters) + sum(self.experts)

    @property
    def count(self) -> int:
        """Number of parameters of the rank."""
        return self.trained + self.frozen


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a model that activations and times depend on."""

    layers: int
    hidden: int
    query: int
    """Elements of the queries of a token in a layer."""
    key: int
    value: int
    attended: int
    """Elements that attention returns for a token."""
    latent: int
    """Elements of the latents that latent attention normalizes; 0 for attention without latents."""
    cached: int
    """Elements that a server caches for a token in a layer: keys and values, or the latent that they are made from."""
    attention_weights: int
    """Elements of the matrices of a layer's attention."""
    heads: int
    feed_forward: int
    vocabulary: int
    positions: int
    """Longest sequence that the model supports, in tokens."""
    query_norm: bool
    """Whether queries and keys are normalized."""
    post_norms: bool
    """Whether the outputs of attention and feed-forward layers are normalized."""
    parameters: int
    """Parameters of the model; a tied embedding counts once."""
    active: int
    """Parameters that are used for one token: of the experts, only those that the router chooses."""
    experts: int = 0
    """Experts per layer; 0 for a dense model."""
    chosen: int = 0
    """Experts per token."""
    expert_feed_forward: int = 0
    shared_feed_forward: int = 0
    """Feed-forward size of the experts that every token passes through, next to the chosen ones."""
    mixtures: int = 0
    """Layers with experts; the others are dense."""
    adapters: int = 0
    """Parameters of adapters that are used for one token; 0 if the model's own weights are trained."""


@dataclass
class _Totals:
    """Parameters of all ranks of the stages so far, including padding, with the tied embedding once per stage."""

    all: int = 0
    experts: int = 0
    attention: int = 0
    mixtures: int = 0
    adapters: int = 0
    expert_adapters: int = 0


def model_stages(
    model: ModelConfig, parallel: ParallelConfig, world_size: int, adapters: LoRAConfig | None = None
) -> tuple[ModelShape, torch.dtype, list[Stage]]:
    """Build and count one rank of every pipeline stage of a job of `world_size` GPUs.

    Returns:
        the sizes of the model, the dtype of its weights, and its stages.

    Raises:
        UserError: if the layout does not divide the job or the model.
    """
    check_world_size(parallel, world_size, "GPUs", "change --nodes")
    # Transformer Engine may be missing on this machine. The parameters of local layers have the same shapes. What
    # decides about activations alone is left out, so that a search over layouts counts each model once.
    model = replace(model, layer_spec="local", fp8="none")
    defaults = ParallelConfig()
    neutral = {name: getattr(defaults, name) for name in _OF_ACTIVATIONS}
    parallel = replace(parallel, **neutral)
    whole = replace(model, path="")
    key = f"{(Path(model.path) / 'config.json').read_text()} {whole} {parallel} {world_size} {adapters}"
    if key not in _counted:
        _counted[key] = _count_stages(model, parallel, world_size, adapters)
    return _counted[key]


_OF_ACTIVATIONS = ("microbatch_sequences", "microbatch_tokens", "recompute", "recompute_modules")
_counted: dict[str, tuple[ModelShape, torch.dtype, list[Stage]]] = {}


def _count_stages(
    model: ModelConfig, parallel: ParallelConfig, world_size: int, adapters: LoRAConfig | None
) -> tuple[ModelShape, torch.dtype, list[Stage]]:
    totals = _Totals()
    stages = []
    for index in range(parallel.pipeline):
        with fake_rank(parallel, index * (world_size // parallel.pipeline), world_size):
            bridge = PolicyBridge(model, parallel, adapters)
            stages.append(_count(index, bridge.build(shapes_only=True), parallel, totals))
    if parallel.pipeline > 1:
        totals.all -= stages[-1].shared_embedding * parallel.tensor  # also counted on the first stage
    padding = (bridge.padded_vocabulary - bridge.vocab_size) * bridge.config.hidden_size
    totals.all -= padding * (1 if is_tied(bridge.hf_config) else 2)
    return _shape(bridge, totals), bridge.dtype, stages


@contextmanager
def fake_rank(parallel: ParallelConfig, rank: int, world_size: int) -> Iterator[None]:
    """Make this process act as one rank of a job, without any communication."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        initialize_model_parallel(parallel, create_gloo_groups=False)
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def _count(index: int, model_chunks: Sequence[PolicyModel], parallel: ParallelConfig, totals: _Totals) -> Stage:
    """Count the parameters of one rank of a stage, and add the parameters of all ranks of the stage to `totals`."""
    named = [(f"{i}.{name}", p) for i, chunk in enumerate(model_chunks) for name, p in chunk.named_parameters()]
    experts = {name for name, p in named if not getattr(p, "allreduce", True)}
    # Number of ranks that each have a different slice of a parameter.
    ranks = {name: parallel.tensor if getattr(p, "tensor_model_parallel", False) else 1 for name, p in named}
    ranks |= dict.fromkeys(experts, parallel.expert * parallel.expert_tensor)
    own = [(name, p) for name, p in named if ADAPTERS not in name]
    totals.all += sum(p.numel() * ranks[name] for name, p in own)
    totals.experts += sum(p.numel() * ranks[name] for name, p in own if ".mlp.experts." in name)
    totals.attention += sum(p.numel() * ranks[name] for name, p in own if ".self_attention." in name and p.dim() == 2)
    added = {name: p.numel() * ranks[name] for name, p in named if ADAPTERS in name}
    totals.adapters += sum(added.values())
    totals.expert_adapters += sum(count for name, count in added.items() if ".mlp.experts." in name)
    layers = [layer for chunk in model_chunks for layer in chunk.decoder.layers]
    mixtures = sum(isinstance(layer.mlp, MoELayer) for layer in layers)
    totals.mixtures += mixtures
    first = {isinstance(layer.mlp, MoELayer): layer for layer in reversed(layers)}
    shared = [p.numel() for _, p in named if getattr(p, "shared_embedding", False)]
    return Stage(
        index=index,
        layers=len(layers),
        mixtures=mixtures,
        parameters=tuple(p.numel() for name, p in reversed(named) if name not in experts and p.requires_grad),
        experts=tuple(p.numel() for name, p in reversed(named) if name in experts and p.requires_grad),
        shared_embedding=shared[0] if shared else 0,
        # An export gathers one megatron-core tensor at a time: the embedding, gate and up projection together, or one
        # expert per expert rank.
        largest_tensor=max(p.numel() * ranks[name] for name, p in own),
        frozen=sum(p.numel() for _, p in named if not p.requires_grad),
        adapted=(adapted_layers(first.get(False)), adapted_layers(first.get(True))),
    )


def adapted_layers(layer: Module | None) -> tuple[AdaptedLayer, ...]:
    """Return the adapters within a transformer layer of this rank; none if there is no such layer."""
    found = []
    for adapters in layer_adapters(layer) if layer is not None else ():
        parts = [part for part in adapters.parts if part is not None]
        found.append(
            AdaptedLayer(
                adapters.layer_name,
                len(parts),
                parts[0].lora_A.size(1),
                sum(adapters.rows),
                routed=parts[0].of_expert,
                splits_tokens=adapters.split_dim != 0,
            )
        )
    return tuple(found)


def _shape(bridge: PolicyBridge, totals: _Totals) -> ModelShape:
    config = bridge.config
    experts = config.num_moe_experts or 0
    chosen = config.moe_router_topk if experts else 0
    of_one_token = chosen / experts if experts else 0.0
    return ModelShape(
        layers=config.num_layers,
        hidden=config.hidden_size,
        **attention_sizes(config),
        attention_weights=totals.attention // config.num_layers,
        heads=config.num_attention_heads,
        feed_forward=config.ffn_hidden_size,
        vocabulary=bridge.vocab_size,
        positions=bridge.context_length,
        query_norm=config.qk_layernorm and not config.multi_latent_attention,
        post_norms=bridge.family.post_norms,
        parameters=totals.all,
        active=totals.all - totals.experts + (totals.experts * chosen // experts if experts else 0),
        experts=experts,
        chosen=chosen,
        expert_feed_forward=config.moe_ffn_hidden_size if experts else 0,
        shared_feed_forward=config.moe_shared_expert_intermediate_size or 0 if experts else 0,
        mixtures=totals.mixtures,
        adapters=totals.adapters - totals.expert_adapters + int(totals.expert_adapters * of_one_token),
    )


def attention_sizes(config: TransformerConfig) -> dict[str, int]:
    """Return the sizes of a layer's attention, fields of `ModelShape`."""
    heads = config.num_attention_heads
    if isinstance(config, MLATransformerConfig):
        query, value = config.qk_head_dim + config.qk_pos_emb_head_dim, config.v_head_dim
        return {
            "query": heads * query,
            "key": heads * query,
            "value": heads * value,
            "attended": heads * value,
            "latent": (config.q_lora_rank or 0) + config.kv_lora_rank,
            "cached": config.kv_lora_rank + config.qk_pos_emb_head_dim,
        }
    query, key_value = (count * config.kv_channels for count in (heads, config.num_query_groups))
    return {
        "query": query,
        "key": key_value,
        "value": key_value,
        "attended": query,
        "latent": 0,
        "cached": 2 * key_value,
    }
