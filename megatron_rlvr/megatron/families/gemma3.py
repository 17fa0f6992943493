"""Gemma 3, the text models: norms after attention and feed-forward layers, and two kinds of layers.

Five of six layers attend to a window of the latest tokens, with a rotary base of their own.
"""

from __future__ import annotations

from typing import Any

from torch.nn.functional import gelu

from megatron_rlvr.megatron.families.family import (
    ATTENTION,
    EMBEDDINGS,
    HF_LAYER,
    LAYER,
    MLP,
    QUERY_KEY_NORMS,
    Family,
)
from megatron_rlvr.megatron.families.weight_map import Plain

_NORMS = {
    "input_layernorm": "input_layernorm",
    "self_attention.post_layernorm": "post_attention_layernorm",
    "pre_mlp_layernorm": "pre_feedforward_layernorm",
    "mlp.post_layernorm": "post_feedforward_layernorm",
}


def _settings(hf_config: Any) -> dict[str, Any]:
    return {
        "qk_layernorm": True,
        "layernorm_zero_centered_gamma": True,  # norms multiply by 1 + weight
        "activation_func": gelu,  # megatron-core and `GatedActivation` compute its tanh approximation
        "softmax_scale": hf_config.query_pre_attn_scalar**-0.5,
        "window_size": (hf_config.sliding_window - 1, 0),
        "window_attn_skip_freq": [int(kind == "sliding_attention") for kind in hf_config.layer_types],
    }


def _supported(hf_config: Any) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    return {
        "hidden_activation": (hf_config.hidden_activation, ("gelu_pytorch_tanh",)),
        "attention_bias": (hf_config.attention_bias, (False,)),
        "attn_logit_softcapping": (hf_config.attn_logit_softcapping, (None,)),
        "final_logit_softcapping": (hf_config.final_logit_softcapping, (None,)),
        "use_bidirectional_attention": (hf_config.use_bidirectional_attention, (False,)),
    }


GEMMA3 = Family(
    weights=(
        *EMBEDDINGS,
        *(Plain(f"{LAYER}.{own}.weight", f"{HF_LAYER}.{name}.weight") for own, name in _NORMS.items()),
        *ATTENTION,
        *QUERY_KEY_NORMS,
        *MLP,
    ),
    settings=_settings,
    supported=_supported,
    post_norms=True,
    embedding_scale=lambda hf_config: hf_config.hidden_size**0.5,
)
