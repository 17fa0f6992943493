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
from megatron_rlvr.megatron.families.weight_map import QKV, Float32, GatedMLP, Vocabulary, WeightMap, head_size_of
from megatron_rlvr.megatron.huggingface_config import is_tied
from megatron_rlvr.weights.derived_tensors import HEAD, difference

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
"""dtypes in which weights can be read, by their name in safetensors files."""


@dataclass(frozen=True)
class FolderWeights:
    """What a folder holds.

    Attributes:
        files: the file of every weight, and of every derived tensor.
        dtypes: the dtypes of the weights that have the dtype of the model.
        derived: names of tensors that the model does not load, because it computes their value.
        prediction: names of tensors for multi-token prediction, which is not trained.
    """

    files: Mapping[str, Path]
    dtypes: frozenset[torch.dtype]
    derived: frozenset[str]
    prediction: frozenset[str] = frozenset()


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
    in_float32 = names_in_float32(hf_config)
    others: list[str] = []
    dtypes: set[torch.dtype] = set()
    folder = next(iter(files.values())).parent
    prediction = _prediction(files, hf_config)
    files = {name: file for name, file in files.items() if name not in prediction}
    layers = {layer for name in files if (layer := _layer_of(name)) is not None}
    for file in sorted(set(files.values())):
        with safe_open(file, framework="pt", device="cpu") as opened:
            for name in opened.keys():  # noqa: SIM118, it is not a dict
                if name in prediction:
                    continue
                if name not in expected:
                    others.append(name)
                    continue
                stored, shape = opened.get_slice(name), expected[name]
                if stored.get_shape() != shape:
                    raise UserError(
                        f"{file}: {name} has shape {stored.get_shape()}, but config.json describes {shape}: the folder "
                        "does not match its config.json; download both again"
                    )
                if stored.get_dtype() not in DTYPES:
                    raise UserError(
                        f"{file}: {name} has dtype {stored.get_dtype()}: use the model before its quantization, in "
                        "float32, bfloat16 or float16"
                    )
                if not name.endswith(in_float32):
                    dtypes.add(DTYPES[stored.get_dtype()])
    count = hf_config.num_hidden_layers
    if not layers and (other := next((name for name in sorted(others) if ".layers." in name), None)):
        raise UserError(
            f"{folder}: no weight is named model.layers.*, but there is {other}: save the text model of a multimodal "
            "model alone, with the names of transformers"
        )
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
    return FolderWeights(files, frozenset(dtypes), frozenset(others), prediction)


def _prediction(files: Mapping[str, Path], hf_config: Any) -> frozenset[str]:
    """Return the tensors of the layers for multi-token prediction, which follow the model's own layers."""
    first = hf_config.num_hidden_layers
    layers = range(first, first + (getattr(hf_config, "num_nextn_predict_layers", None) or 0))
    return frozenset(name for name in files if _layer_of(name) in layers)


def _layer_of(name: str) -> int | None:
    """Return the layer that a tensor belongs to by its name; None if it belongs to no layer."""
    match = re.match(r"model\.layers\.(\d+)\.", name)
    return int(match[1]) if match else None


def unused_warning(found: FolderWeights) -> str | None:
    """Return a warning if the folder has weights that are neither trained nor exported, and None if it has none."""
    if not found.prediction:
        return None
    return f"{len(found.prediction)} tensors for multi-token prediction are not trained, and an export lacks them"


def stored_dtype(name: str, own: torch.dtype, requested: torch.dtype | None, hf_config: Any) -> torch.dtype:
    """Return the dtype of a weight in a folder.

    Args:
        name: Hugging Face name of the weight.
        own: dtype of the weight in the model.
        requested: dtype for the weights of the folder; None keeps them.
        hf_config: transformers configuration of the model, whose family has weights that stay in float32.
    """
    return own if requested is None or name.endswith(names_in_float32(hf_config)) else requested


def names_in_float32(hf_config: Any) -> tuple[str, ...]:
    """Return the ends of the names of weights that are in float32, whatever the dtype of the model."""
    table = family_of(hf_config).weights
    return tuple(entry.huggingface.rpartition("*")[2] for entry in table if isinstance(entry, Float32))


def rounding(dtypes: Collection[torch.dtype], dtype: torch.dtype) -> str | None:
    """Return a warning if weights of `dtypes` change when they are converted to `dtype`, and None if none does."""
    rounded = [str(d).removeprefix("torch.") for d in dtypes if torch.promote_types(d, dtype) != dtype]
    target = str(dtype).removeprefix("torch.")
    return f"weights in {' and '.join(sorted(rounded))} are rounded to {target}" if rounded else None


def expected_weights(hf_config: Any) -> dict[str, list[int]]:
    """Return the shape of every weight of a model by its Hugging Face name, in the order of the family's table."""
    settings = family_of(hf_config).settings(hf_config)
    experts = settings.get("num_moe_experts", 0)
    expected = {}
    for entry in family_of(hf_config).weights:
        layers = _layers(entry, settings, hf_config.num_hidden_layers)
        for pattern, shape in zip(entry.names, _shapes(entry, hf_config), strict=True):
            if pattern == HEAD and is_tied(hf_config):
                continue
            for layer in layers if "*" in pattern else (0,):
                name = pattern.replace("*", str(layer), 1)
                for expert in range(experts) if "*" in name else (0,):
                    expected[name.replace("*", str(expert), 1)] = shape
    return expected


_OF_QUERY_LATENT = ("linear_q_down_proj", "q_layernorm", "linear_q_up_proj")


def _layers(entry: WeightMap, settings: Mapping[str, Any], count: int) -> list[int]:
    """Return the layers that have a weight."""
    name = entry.megatron
    if name.endswith("linear_qkv.bias") and not settings.get("add_qkv_bias"):
        return []
    if name.endswith(("q_layernorm.weight", "k_layernorm.weight")) and not settings.get("qk_layernorm"):
        return []
    if settings.get("multi_latent_attention"):
        latent = settings["q_lora_rank"] is not None
        if name.split(".")[-2] in (("linear_q_proj",) if latent else _OF_QUERY_LATENT):
            return []
    kinds = settings.get("moe_layer_freq", [int("num_moe_experts" in settings)] * count)
    if ".mlp.router." in name or ".mlp.experts." in name or ".mlp.shared_experts." in name:
        return [layer for layer, mixture in enumerate(kinds) if mixture]
    if ".mlp.linear_" in name:
        return [layer for layer, mixture in enumerate(kinds) if not mixture]
    return list(range(count))


def _shapes(entry: WeightMap, hf_config: Any) -> list[list[int]]:
    """Return the shapes of the Hugging Face tensors of a weight, from its place in megatron-core's layers."""
    settings = family_of(hf_config).settings(hf_config)
    hidden, head = hf_config.hidden_size, head_size_of(hf_config)
    query, key_value = head * hf_config.num_attention_heads, head * hf_config.num_key_value_heads
    feed_forward = hf_config.intermediate_size
    if ".experts." in entry.megatron:
        feed_forward = settings["moe_ffn_hidden_size"]
    elif ".shared_experts." in entry.megatron:
        feed_forward = settings["moe_shared_expert_intermediate_size"]
    elif entry.megatron.endswith(".expert_bias"):
        return [[settings["num_moe_experts"]]]
    if isinstance(entry, QKV):
        columns = [] if entry.megatron.endswith(".bias") else [hidden]
        return [[rows, *columns] for rows in (query, key_value, key_value)]
    if isinstance(entry, GatedMLP):
        return [[feed_forward, hidden]] * 2
    if isinstance(entry, Vocabulary):
        return [[hf_config.vocab_size, hidden]]
    by_module = {
        "linear_proj": [hidden, query],
        "linear_fc2": [hidden, feed_forward],
        "router": [settings.get("num_moe_experts", 0), hidden],
        "q_layernorm": [head],
        "k_layernorm": [head],
    }
    if settings.get("multi_latent_attention"):
        by_module |= _latent_shapes(settings, hf_config)
    return [by_module.get(entry.megatron.split(".")[-2], [hidden])]


def _latent_shapes(settings: Mapping[str, Any], hf_config: Any) -> dict[str, list[int]]:
    """Return the shapes of the weights of latent attention by module."""
    hidden, heads = hf_config.hidden_size, hf_config.num_attention_heads
    query_rank, rank = settings["q_lora_rank"], settings["kv_lora_rank"]
    content, rotary, value = (settings[name] for name in ("qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim"))
    return {
        "linear_q_proj": [heads * (content + rotary), hidden],
        "linear_q_down_proj": [query_rank, hidden],
        "q_layernorm": [query_rank],
        "linear_q_up_proj": [heads * (content + rotary), query_rank],
        "linear_kv_down_proj": [rank + rotary, hidden],
        "kv_layernorm": [rank],
        "linear_kv_up_proj": [heads * (content + value), rank],
        "linear_proj": [hidden, heads * value],
    }


def _why(name: str, hf_config: Any) -> str:
    """Return the end of the error for a missing weight."""
    if name == HEAD:
        return (
            "and config.json has tie_word_embeddings=false: set it to true if the output layer is the embedding, or "
            "download the model again"
        )
    return f"which {hf_config.model_type} needs: download the model again"
