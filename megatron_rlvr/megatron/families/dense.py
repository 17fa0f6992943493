"""Qwen2, Qwen2.5, Qwen3 and Llama 3: dense models."""

from __future__ import annotations

from typing import Any

from megatron_rlvr.megatron.families.family import (
    ATTENTION,
    EMBEDDINGS,
    MLP,
    NORMS,
    QKV_BIAS,
    QUERY_KEY_NORMS,
    Family,
)

_DENSE = (*EMBEDDINGS, *NORMS, *ATTENTION, *MLP)


def no_biases(hf_config: Any) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    biases = {name: (getattr(hf_config, name, False), (False,)) for name in ("attention_bias", "mlp_bias")}
    return {"hidden_act": (hf_config.hidden_act, ("silu",)), **biases}


def full_attention(hf_config: Any) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    sliding = getattr(hf_config, "use_sliding_window", False)
    other = next((kind for kind in getattr(hf_config, "layer_types", None) or () if kind != "full_attention"), None)
    return no_biases(hf_config) | {
        "use_sliding_window": (sliding, (False,)),
        "layer_types": (other, (None,)),
    }


LLAMA = Family(weights=_DENSE, settings=lambda hf_config: {}, supported=no_biases)
QWEN2 = Family(
    weights=(*_DENSE, *QKV_BIAS), settings=lambda hf_config: {"add_qkv_bias": True}, supported=full_attention
)
QWEN3 = Family(
    weights=(*_DENSE, *QUERY_KEY_NORMS), settings=lambda hf_config: {"qk_layernorm": True}, supported=full_attention
)
