"""Mixtures with shared experts and a sigmoid router with a bias per expert, as DeepSeek-V3 and GLM-4.5 have them.

The bias only chooses experts. Pretraining balances their load with it; here it keeps its value. Experts may be chosen
from the best groups only. The first layers are dense.
"""

from __future__ import annotations

from typing import Any

from megatron_rlvr.megatron.families.family import EXPERTS, HF_LAYER, LAYER, MLP, gated_mlp
from megatron_rlvr.megatron.families.weight_map import Float32, Plain, WeightMap

FEED_FORWARD: tuple[WeightMap, ...] = (
    *MLP,
    Plain(f"{LAYER}.mlp.router.weight", f"{HF_LAYER}.mlp.gate.weight"),
    Float32(f"{LAYER}.mlp.router.expert_bias", f"{HF_LAYER}.mlp.gate.e_score_correction_bias"),
    *EXPERTS,
    *gated_mlp(f"{LAYER}.mlp.shared_experts", f"{HF_LAYER}.mlp.shared_experts"),
)
SIZES = (
    "n_routed_experts",
    "n_shared_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "first_k_dense_replace",
    "n_group",
    "topk_group",
)
"""Keys of config.json that must be integers."""


def mixture_settings(hf_config: Any) -> dict[str, Any]:
    """Return the fields of TransformerConfig of the feed-forward layers."""
    layers = hf_config.num_hidden_layers
    dense = min(hf_config.first_k_dense_replace, layers)
    settings = {
        "num_moe_experts": hf_config.n_routed_experts,
        "moe_router_topk": hf_config.num_experts_per_tok,
        "moe_ffn_hidden_size": hf_config.moe_intermediate_size,
        "moe_shared_expert_intermediate_size": hf_config.n_shared_experts * hf_config.moe_intermediate_size,
        "moe_layer_freq": [0] * dense + [1] * (layers - dense),
        "moe_router_score_function": "sigmoid",
        # In bf16, the scores of 256 experts would have ties, and a bias would hide most of their differences.
        "moe_router_dtype": "fp32",
        "moe_router_enable_expert_bias": True,
        "moe_router_bias_update_rate": 0.0,
        "moe_router_topk_scaling_factor": hf_config.routed_scaling_factor,
    }
    if hf_config.n_group > 1:
        settings |= {"moe_router_num_groups": hf_config.n_group, "moe_router_group_topk": hf_config.topk_group}
    return settings


def mixture_supported(hf_config: Any) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Return the values of config.json that decide whether these layers are computed, and the supported ones."""
    supported = {
        "hidden_act": (hf_config.hidden_act, ("silu",)),
        "norm_topk_prob": (hf_config.norm_topk_prob, (True,)),
        # These keys are not in the configuration of transformers, whose code assumes the values.
        "scoring_func": (getattr(hf_config, "scoring_func", "sigmoid"), ("sigmoid",)),
        "topk_method": (getattr(hf_config, "topk_method", "noaux_tc"), ("noaux_tc",)),
        "moe_layer_freq": (getattr(hf_config, "moe_layer_freq", 1), (1,)),
    }
    if hf_config.n_group > 1:  # megatron-core sums the best experts_per_token / topk_group of a group, the models 2
        supported["num_experts_per_tok"] = (hf_config.num_experts_per_tok, (2 * hf_config.topk_group,))
    elif hf_config.num_experts_per_tok == 1:  # megatron-core does not normalize the weight of a single expert
        supported["num_experts_per_tok"] = (1, ("at least 2",))
    return supported


def size_error(hf_config: Any) -> str | None:
    """Return why the sizes of groups and experts exclude each other; None if they do not."""
    experts, groups = hf_config.n_routed_experts, hf_config.n_group
    if experts % groups:
        return f"n_group={groups} does not divide n_routed_experts={experts}"
    if hf_config.topk_group > groups:
        return f"topk_group={hf_config.topk_group} is more than n_group={groups}"
    if groups > 1 and hf_config.num_experts_per_tok > hf_config.topk_group * (experts // groups):
        return (
            f"num_experts_per_tok={hf_config.num_experts_per_tok} is more than the "
            f"{hf_config.topk_group * (experts // groups)} experts of topk_group={hf_config.topk_group} groups"
        )
    return None
