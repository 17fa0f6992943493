"""What a model family is: its weights, its settings in megatron-core, and what this project does not compute of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_rlvr.megatron.families.weight_map import QKV, GatedMLP, Plain, Vocabulary, WeightMap, WeightTable

LAYER = "decoder.layers.*"
HF_LAYER = "model.layers.*"


@dataclass(frozen=True)
class Family:
    """A family of models that share the names of their weights.

    Attributes:
        weights: one map per weight of megatron-core's local layers.
        settings: returns fields of TransformerConfig, by name, from the transformers configuration; added to those of
            `transformer_settings`.
        supported: returns, by key of config.json, the value that the model has and the values that are supported.
        sizes: keys of config.json that must be integers, in addition to those of every model.
        size_error: returns why sizes of config.json exclude each other, or None.
        mixture: whether feed-forward layers are mixtures of experts.
        post_norms: whether the outputs of attention and feed-forward layers are normalized before they are added to
            the residual stream.
        partial_rotary: whether models may rotate a part of each head.
        embedding_scale: returns the factor of the embeddings; None for no factor.
    """

    weights: Sequence[WeightMap]
    settings: Callable[[Any], dict[str, Any]]
    supported: Callable[[Any], Mapping[str, tuple[Any, tuple[Any, ...]]]] = lambda hf_config: {}
    sizes: Sequence[str] = ()
    size_error: Callable[[Any], str | None] = lambda hf_config: None
    mixture: bool = False
    post_norms: bool = False
    partial_rotary: bool = False
    embedding_scale: Callable[[Any], float] | None = None
    table: WeightTable = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "table", WeightTable(self.weights))


# The names below are shared by most families. `LAYER` is a layer of megatron-core, `HF_LAYER` the same in the folder.

EMBEDDINGS: tuple[WeightMap, ...] = (
    Vocabulary("embedding.word_embeddings.weight", "model.embed_tokens.weight"),
    Plain("decoder.final_layernorm.weight", "model.norm.weight"),
    Vocabulary("output_layer.weight", "lm_head.weight"),
)
NORMS: tuple[WeightMap, ...] = (
    Plain(f"{LAYER}.input_layernorm.weight", f"{HF_LAYER}.input_layernorm.weight"),
    Plain(f"{LAYER}.pre_mlp_layernorm.weight", f"{HF_LAYER}.post_attention_layernorm.weight"),
)
ATTENTION: tuple[WeightMap, ...] = (
    QKV(
        f"{LAYER}.self_attention.linear_qkv.weight",
        *(f"{HF_LAYER}.self_attn.{name}_proj.weight" for name in "qkv"),
    ),
    Plain(f"{LAYER}.self_attention.linear_proj.weight", f"{HF_LAYER}.self_attn.o_proj.weight"),
)
QKV_BIAS: tuple[WeightMap, ...] = (
    QKV(
        f"{LAYER}.self_attention.linear_qkv.bias",
        *(f"{HF_LAYER}.self_attn.{name}_proj.bias" for name in "qkv"),
    ),
)
QUERY_KEY_NORMS: tuple[WeightMap, ...] = tuple(
    Plain(f"{LAYER}.self_attention.{name}_layernorm.weight", f"{HF_LAYER}.self_attn.{name}_norm.weight")
    for name in "qk"
)


def gated_mlp(
    megatron: str, huggingface: str, names: Sequence[str] = ("gate_proj", "up_proj", "down_proj")
) -> tuple[WeightMap, ...]:
    """Return the maps of a gated feed-forward layer.

    Args:
        megatron, huggingface: names of the layer.
        names: the Hugging Face names of its three projections.
    """
    gate, up, down = (f"{huggingface}.{name}.weight" for name in names)
    return (
        GatedMLP(f"{megatron}.linear_fc1.weight", gate, up),
        Plain(f"{megatron}.linear_fc2.weight", down),
    )


MLP = gated_mlp(f"{LAYER}.mlp", f"{HF_LAYER}.mlp")
EXPERTS = gated_mlp(f"{LAYER}.mlp.experts.local_experts.*", f"{HF_LAYER}.mlp.experts.*")
