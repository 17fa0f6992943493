"""GLM-4.5: dense first layers, then mixtures with shared experts and a sigmoid router with a bias per expert.

The bias only chooses experts. Pretraining balances their load with it; here it keeps its value.
"""

from __future__ import annotations

from typing import Any

from megatron_rlvr.megatron.families.family import (
    ATTENTION,
    EMBEDDINGS,
    EXPERTS,
    HF_LAYER,
    LAYER,
    MLP,
    NORMS,
    QKV_BIAS,
    QUERY_KEY_NORMS,
    Family,
    gated_mlp,
)
from megatron_rlvr.megatron.families.weight_map import Plain


def _settings(hf_config: Any) -> dict[str, Any]:
    dense, layers = hf_config.first_k_dense_replace, hf_config.num_hidden_layers
    settings = {
        "add_qkv_bias": hf_config.attention_bias,
        "qk_layernorm": hf_config.use_qk_norm,
        "num_moe_experts": hf_config.n_routed_experts,
        "moe_router_topk": hf_config.num_experts_per_tok,
        "moe_ffn_hidden_size": hf_config.moe_intermediate_size,
        "moe_shared_expert_intermediate_size": hf_config.n_shared_experts * hf_config.moe_intermediate_size,
        "moe_layer_freq": [0] * dense + [1] * (layers - dense),
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_bias_update_rate": 0.0,
        "moe_router_topk_scaling_factor": hf_config.routed_scaling_factor,
    }
    if hf_config.n_group > 1:
        settings |= {"moe_router_num_groups": hf_config.n_group, "moe_router_group_topk": hf_config.topk_group}
    return settings


def _supported(hf_config: Any) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    supported = {
        "hidden_act": (hf_config.hidden_act, ("silu",)),
        "norm_topk_prob": (hf_config.norm_topk_prob, (True,)),
    }
    if hf_config.n_group > 1:  # megatron-core sums the best experts_per_token / topk_group of a group, GLM the best 2
        supported["num_experts_per_tok"] = (hf_config.num_experts_per_tok, (2 * hf_config.topk_group,))
    return supported


GLM4_MOE = Family(
    weights=(
        *EMBEDDINGS,
        *NORMS,
        *ATTENTION,
        *QKV_BIAS,
        *QUERY_KEY_NORMS,
        *MLP,
        Plain(f"{LAYER}.mlp.router.weight", f"{HF_LAYER}.mlp.gate.weight"),
        Plain(f"{LAYER}.mlp.router.expert_bias", f"{HF_LAYER}.mlp.gate.e_score_correction_bias"),
        *EXPERTS,
        *gated_mlp(f"{LAYER}.mlp.shared_experts", f"{HF_LAYER}.mlp.shared_experts"),
    ),
    settings=_settings,
    supported=_supported,
    mixture=True,
    partial_rotary=True,
)
