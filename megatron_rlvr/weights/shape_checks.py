"""Whether the weights of a Hugging Face folder are of the model that its config.json describes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open

from megatron_rlvr.errors import UserError


def check_shapes(files: Mapping[str, Path], hf_config: Any) -> None:
    """Refuse weights that do not fit config.json, before they are read as another model.

    Reads headers only. Tensors of names that are not known here are not checked.

    Args:
        files: the file of every tensor, from `tensor_files`.
        hf_config: configuration of transformers.

    Raises:
        UserError: names the first tensor that does not fit, or the layers that the weights have instead.
    """
    expected = _expected_shapes(hf_config)
    layers: set[int] = set()
    for file in sorted(set(files.values())):
        with safe_open(file, framework="pt", device="cpu") as opened:
            for name in opened.keys():  # noqa: SIM118, it is not a dict
                layer = re.match(r"model\.layers\.(\d+)\.", name)
                if layer:
                    layers.add(int(layer[1]))
                shape = expected.get(name[layer.end() :] if layer else name)
                if shape and (found := opened.get_slice(name).get_shape()) != shape:
                    raise UserError(
                        f"{file}: {name} has shape {found}, but config.json describes {shape}: the weights belong to "
                        "another model"
                    )
    count = hf_config.num_hidden_layers
    if layers != set(range(count)):
        folder = file.parent
        raise UserError(
            f"{folder}: the weights have layers {min(layers, default=0)} to {max(layers, default=-1)}, but "
            f"config.json describes {count}: they belong to another model"
        )


def _expected_shapes(hf_config: Any) -> dict[str, list[int]]:
    """Shapes by tensor name; names in a layer without ``model.layers.N.``."""
    hidden, vocabulary = hf_config.hidden_size, hf_config.vocab_size
    head = getattr(hf_config, "head_dim", None) or hidden // hf_config.num_attention_heads
    query, key_value = head * hf_config.num_attention_heads, head * hf_config.num_key_value_heads
    feed_forward = hf_config.intermediate_size
    return {
        "model.embed_tokens.weight": [vocabulary, hidden],
        "lm_head.weight": [vocabulary, hidden],
        "self_attn.q_proj.weight": [query, hidden],
        "self_attn.k_proj.weight": [key_value, hidden],
        "self_attn.v_proj.weight": [key_value, hidden],
        "self_attn.o_proj.weight": [hidden, query],
        "mlp.gate_proj.weight": [feed_forward, hidden],
        "mlp.up_proj.weight": [feed_forward, hidden],
        "mlp.down_proj.weight": [hidden, feed_forward],
        "model.norm.weight": [hidden],
        "input_layernorm.weight": [hidden],
        "post_attention_layernorm.weight": [hidden],
    }
