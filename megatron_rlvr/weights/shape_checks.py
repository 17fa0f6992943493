"""Check that a Hugging Face folder has exactly the weights of the model that its config.json describes."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from megatron_rlvr.errors import UserError
from megatron_rlvr.megatron.families import family_of
from megatron_rlvr.megatron.families.weight_map import head_size_of
from megatron_rlvr.megatron.huggingface_config import is_mixture, is_tied
from megatron_rlvr.weights.derived_tensors import EMBEDDING, HEAD, difference

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
"""dtypes in which weights can be read, by their name in safetensors files."""


@dataclass(frozen=True)
class FolderWeights:
    """What a folder holds.

    Attributes:
        dtypes: the dtypes of the weights.
        derived: names of tensors that the model does not load, because it computes their value.
    """

    dtypes: frozenset[torch.dtype]
    derived: frozenset[str]


def check_shapes(files: Mapping[str, Path], hf_config: Any) -> FolderWeights:
    """Refuse weights that are not those of config.json: other shapes or layers, missing, unknown or quantized tensors.

    This reads only the headers of the files, and tensors that the model does not load (`derived_tensors`).

    Args:
        files: the file of every tensor, from `tensor_files`.
        hf_config: transformers configuration of the model.

    Raises:
        UserError: for the first tensor that is wrong, missing or unknown, or if the weights have other layers.
    """
    expected = expected_weights(hf_config)
    others: list[str] = []
    dtypes: set[torch.dtype] = set()
    folder = next(iter(files.values())).parent
    layers = {int(match[1]) for name in files if (match := re.match(r"model\.layers\.(\d+)\.", name))}
    for file in sorted(set(files.values())):
        with safe_open(file, framework="pt", device="cpu") as opened:
            for name in opened.keys():  # noqa: SIM118, it is not a dict
                if name not in expected:
                    others.append(name)
                    continue
                stored, shape = opened.get_slice(name), expected[name]
                if shape is not None and stored.get_shape() != shape:
                    raise UserError(
                        f"{file}: {name} has shape {stored.get_shape()}, but config.json describes {shape}: the folder "
                        "does not match its config.json; download both again"
                    )
                if stored.get_dtype() not in DTYPES:
                    raise UserError(
                        f"{file}: {name} has dtype {stored.get_dtype()}: use the model before its quantization, in "
                        "float32, bfloat16 or float16"
                    )
                dtypes.add(DTYPES[stored.get_dtype()])
    count = hf_config.num_hidden_layers
    if layers != set(range(count)):
        raise UserError(
            f"{folder}: the weights have layers {min(layers, default=0)} to {max(layers, default=-1)}, but "
            f"config.json describes {count}: they belong to another model; download both again"
        )
    for name in expected:
        if name not in files:
            raise UserError(f"{folder} lacks {name}, {_why(name, hf_config)}")
    for name in sorted(others):
        if reason := difference(name, files, hf_config):
            raise UserError(f"{folder}: {reason}")
    return FolderWeights(frozenset(dtypes), frozenset(others))


def rounding(dtypes: Collection[torch.dtype], dtype: torch.dtype) -> str | None:
    """Return a warning if weights of `dtypes` change when they are converted to `dtype`, and None if none does."""
    rounded = [str(d).removeprefix("torch.") for d in dtypes if torch.promote_types(d, dtype) != dtype]
    target = str(dtype).removeprefix("torch.")
    return f"weights in {' and '.join(sorted(rounded))} are rounded to {target}" if rounded else None


def expected_weights(hf_config: Any) -> dict[str, list[int] | None]:
    """Return the shape of every weight of a model by its Hugging Face name; None for a weight of unusual shape.

    The names are those of the family's table. A shape that is None is compared when the weight is loaded.
    """
    hidden, vocabulary = hf_config.hidden_size, hf_config.vocab_size
    head = head_size_of(hf_config)
    query, key_value = head * hf_config.num_attention_heads, head * hf_config.num_key_value_heads
    shapes: dict[str, list[int]] = {
        EMBEDDING: [vocabulary, hidden],
        HEAD: [vocabulary, hidden],
        "model.norm.weight": [hidden],
        "self_attn.o_proj.weight": [hidden, query],
        "self_attn.q_norm.weight": [head],
        "self_attn.k_norm.weight": [head],
    }
    norms = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
    shapes |= {f"{norm}.weight": [hidden] for norm in norms}
    for name, rows in (("q", query), ("k", key_value), ("v", key_value)):
        shapes |= {f"self_attn.{name}_proj.weight": [rows, hidden], f"self_attn.{name}_proj.bias": [rows]}
    shapes |= _feed_forward("mlp.", hidden, hf_config.intermediate_size)
    experts = range(0)
    if is_mixture(hf_config):
        experts = range(hf_config.num_experts)
        shapes["mlp.gate.weight"] = [hf_config.num_experts, hidden]
        shapes |= _feed_forward("mlp.experts.*.", hidden, hf_config.moe_intermediate_size)
    patterns = [name for entry in family_of(hf_config).weights for name in entry.names]
    expected = {}
    for pattern in patterns:
        if pattern == HEAD and is_tied(hf_config):
            continue
        shape = shapes.get(pattern.removeprefix("model.layers.*."))
        for layer in range(hf_config.num_hidden_layers) if "*" in pattern else (0,):
            name = pattern.replace("*", str(layer), 1)
            for expert in experts if "*" in name else (0,):
                expected[name.replace("*", str(expert), 1)] = shape
    return expected


def _feed_forward(prefix: str, hidden: int, intermediate: int) -> dict[str, list[int]]:
    return {
        f"{prefix}gate_proj.weight": [intermediate, hidden],
        f"{prefix}up_proj.weight": [intermediate, hidden],
        f"{prefix}down_proj.weight": [hidden, intermediate],
    }


def _why(name: str, hf_config: Any) -> str:
    """Return the end of the error for a missing weight."""
    if name == HEAD:
        return (
            "and config.json has tie_word_embeddings=false: set it to true if the output layer is the embedding, or "
            "download the model again"
        )
    return f"which {hf_config.model_type} needs: download the model again"
