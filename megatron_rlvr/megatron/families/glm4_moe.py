"""GLM-4.5: grouped queries whose heads are rotated in part, and mixtures with a sigmoid router."""

from __future__ import annotations

from typing import Any

from megatron_rlvr.megatron.families.family import ATTENTION, EMBEDDINGS, NORMS, QKV_BIAS, QUERY_KEY_NORMS, Family
from megatron_rlvr.megatron.families.sigmoid_router import (
    FEED_FORWARD,
    SIZES,
    mixture_settings,
    mixture_supported,
    size_error,
)


def _settings(hf_config: Any) -> dict[str, Any]:
    return {
        "add_qkv_bias": hf_config.attention_bias,
        "qk_layernorm": hf_config.use_qk_norm,
        **mixture_settings(hf_config),
    }


GLM4_MOE = Family(
    weights=(*EMBEDDINGS, *NORMS, *ATTENTION, *QKV_BIAS, *QUERY_KEY_NORMS, *FEED_FORWARD),
    settings=_settings,
    supported=mixture_supported,
    sizes=SIZES,
    size_error=size_error,
    mixture=True,
    partial_rotary=True,
)
