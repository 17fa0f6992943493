"""Check that the weights of a Hugging Face folder belong to the model that its config.json describes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open

from megatron_rlvr.errors import UserError


def check_shapes(files: Mapping[str, Path], hf_config: Any) -> None:
    """Refuse weights whose shapes or number of layers differ from config.json.

    This reads only the headers of the files. Tensors with unknown names are not checked.

    Args:
        files: the file of every tensor, from `tensor_files`.
        hf_config: transformers configuration of the model.

    Raises:
        UserError: for the first tensor with another shape, or if the weights have other layers.
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
                if shape and (stored := opened.get_slice(name).get_shape()) != shape:
                    raise UserError(
                        f"{file}: {name} has shape {stored}, but config.json describes {shape}: the weights belong to "
                        "another model; download both again"
                    )
    count = hf_config.num_hidden_layers
    if layers != set(range(count)):
        folder = file.parent
        raise UserError(
            f"{folder}: the weights have layers {min(layers, default=0)} to {max(layers, default=-1)}, but "
            f"config.json describes {count}: they belong to another model; download both again"
        )


def _expected_shapes(hf_config: Any) -> dict[str, list[int]]:
    """Return shapes by tensor name; names of tensors in a layer are without the prefix ``model.layers.N.``."""
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
