"""Qwen3-MoE and Mixtral: a mixture of experts in every layer, chosen by a softmax router."""

from __future__ import annotations

from typing import Any

from megatron_rlvr.megatron.families.dense import full_attention, no_biases
from megatron_rlvr.megatron.families.family import (
    ATTENTION,
    EMBEDDINGS,
    EXPERTS,
    HF_LAYER,
    LAYER,
    NORMS,
    QUERY_KEY_NORMS,
    Family,
    gated_mlp,
)
from megatron_rlvr.megatron.families.weight_map import Plain

_ROUTER = f"{LAYER}.mlp.router.weight"
_LOCAL_EXPERT = f"{LAYER}.mlp.experts.local_experts.*"
_MIXTRAL = f"{HF_LAYER}.block_sparse_moe"


def _experts(hf_config: Any, feed_forward: int) -> dict[str, Any]:
    return {
        "num_moe_experts": hf_config.num_experts,
        "moe_router_topk": hf_config.num_experts_per_tok,
        "moe_ffn_hidden_size": feed_forward,
        "moe_router_score_function": "softmax",
        # The softmax is over the chosen experts, which equals one over all that is normalized over the chosen.
        "moe_router_pre_softmax": False,
    }


def _chosen_supported(hf_config: Any) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    if hf_config.num_experts_per_tok > 1:
        return {}
    return {"num_experts_per_tok": (1, ("at least 2",))}  # megatron-core refuses a softmax over one chosen expert


def _qwen3_supported(hf_config: Any) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    return (
        full_attention(hf_config)
        | _chosen_supported(hf_config)
        | {
            "norm_topk_prob": (hf_config.norm_topk_prob, (True,)),
            "decoder_sparse_step": (hf_config.decoder_sparse_step, (1,)),
            "mlp_only_layers": (hf_config.mlp_only_layers, ([], None)),
        }
    )


def _mixtral_supported(hf_config: Any) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    return (
        no_biases(hf_config)
        | _chosen_supported(hf_config)
        | {
            "sliding_window": (hf_config.sliding_window, (None,)),
            "router_jitter_noise": (hf_config.router_jitter_noise, (0.0,)),
        }
    )


QWEN3_MOE = Family(
    weights=(
        *EMBEDDINGS,
        *NORMS,
        *ATTENTION,
        *QUERY_KEY_NORMS,
        Plain(_ROUTER, f"{HF_LAYER}.mlp.gate.weight"),
        *EXPERTS,
    ),
    settings=lambda hf_config: {"qk_layernorm": True, **_experts(hf_config, hf_config.moe_intermediate_size)},
    supported=_qwen3_supported,
    mixture=True,
)
MIXTRAL = Family(
    weights=(
        *EMBEDDINGS,
        *NORMS,
        *ATTENTION,
        Plain(_ROUTER, f"{_MIXTRAL}.gate.weight"),
        *gated_mlp(_LOCAL_EXPERT, f"{_MIXTRAL}.experts.*", names=("w1", "w3", "w2")),
    ),
    settings=lambda hf_config: _experts(hf_config, hf_config.intermediate_size),
    supported=_mixtral_supported,
    mixture=True,
)
