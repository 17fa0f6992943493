"""DeepSeek-V3 and R1, Moonlight and Kimi-K2: multi-head latent attention, and mixtures with a sigmoid router."""

from __future__ import annotations

from typing import Any

from megatron_rlvr.megatron.families.family import EMBEDDINGS, HF_LAYER, LAYER, NORMS, Family
from megatron_rlvr.megatron.families.sigmoid_router import (
    FEED_FORWARD,
    SIZES,
    mixture_settings,
    mixture_supported,
    size_error,
)
from megatron_rlvr.megatron.families.weight_map import Plain

_PROJECTIONS = {
    "linear_q_proj": "q_proj",
    "linear_q_down_proj": "q_a_proj",
    "q_layernorm": "q_a_layernorm",
    "linear_q_up_proj": "q_b_proj",
    "linear_kv_down_proj": "kv_a_proj_with_mqa",
    "kv_layernorm": "kv_a_layernorm",
    "linear_kv_up_proj": "kv_b_proj",
    "linear_proj": "o_proj",
}
"""Of a model whose queries pass through a latent, all but the first; of another one, not the next three."""


def _settings(hf_config: Any) -> dict[str, Any]:
    rope = hf_config.rope_parameters
    scaled = rope["rope_type"] != "default"
    return {
        "multi_latent_attention": True,
        "num_query_groups": hf_config.num_attention_heads,
        "kv_channels": hf_config.qk_rope_head_dim,  # the rotated part; the other sizes are the next five
        "q_lora_rank": hf_config.q_lora_rank,
        "kv_lora_rank": hf_config.kv_lora_rank,
        "qk_head_dim": hf_config.qk_nope_head_dim,
        "qk_pos_emb_head_dim": hf_config.qk_rope_head_dim,
        "v_head_dim": hf_config.v_head_dim,
        "qk_layernorm": True,
        # megatron-core derives the factor of attention scores from the next two. Angles are `PolicyModel`'s.
        "rotary_scaling_factor": rope.get("factor", 1.0) if scaled else 1.0,
        "mscale_all_dim": rope.get("mscale_all_dim") or 0.0,
        "softmax_scale": None,
        "rope_type": "rope",
        **mixture_settings(hf_config),
    }


def _supported(hf_config: Any) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    return mixture_supported(hf_config) | {
        "attention_bias": (hf_config.attention_bias, (False,)),
        "rope_interleave": (hf_config.rope_interleave, (True,)),
        "num_key_value_heads": (hf_config.num_key_value_heads, (hf_config.num_attention_heads,)),
    }


DEEPSEEK_V3 = Family(
    weights=(
        *EMBEDDINGS,
        *NORMS,
        *(
            Plain(f"{LAYER}.self_attention.{own}.weight", f"{HF_LAYER}.self_attn.{name}.weight")
            for own, name in _PROJECTIONS.items()
        ),
        *FEED_FORWARD,
    ),
    settings=_settings,
    supported=_supported,
    sizes=(*SIZES, "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"),
    size_error=size_error,
    mixture=True,
)
