"""Qwen3-MoE: a mixture of experts in every layer, chosen by a softmax router."""

from __future__ import annotations

from typing import Any

from megatron_rlvr.megatron.families.dense import full_attention
from megatron_rlvr.megatron.families.family import (
    ATTENTION,
    EMBEDDINGS,
    EXPERTS,
    HF_LAYER,
    LAYER,
    NORMS,
    QUERY_KEY_NORMS,
    Family,
)
from megatron_rlvr.megatron.families.weight_map import Plain


def _settings(hf_config: Any) -> dict[str, Any]:
    return {
        "qk_layernorm": True,
        "num_moe_experts": hf_config.num_experts,
        "moe_router_topk": hf_config.num_experts_per_tok,
        "moe_ffn_hidden_size": hf_config.moe_intermediate_size,
        "moe_router_score_function": "softmax",
        "moe_router_pre_softmax": False,  # the softmax is over the chosen experts: norm_topk_prob
    }


def _supported(hf_config: Any) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    return full_attention(hf_config) | {
        "norm_topk_prob": (hf_config.norm_topk_prob, (True,)),
        "decoder_sparse_step": (hf_config.decoder_sparse_step, (1,)),
        "mlp_only_layers": (hf_config.mlp_only_layers, ([], None)),
    }


QWEN3_MOE = Family(
    weights=(
        *EMBEDDINGS,
        *NORMS,
        *ATTENTION,
        *QUERY_KEY_NORMS,
        Plain(f"{LAYER}.mlp.router.weight", f"{HF_LAYER}.mlp.gate.weight"),
        *EXPERTS,
    ),
    settings=_settings,
    supported=_supported,
    mixture=True,
)
