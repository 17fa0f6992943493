"""Tensors of a Hugging Face folder that its other files determine, so that a model need not load them.

Earlier versions of transformers saved rotary frequencies, masks and positions with the weights, and a folder of a
tied model may hold the embedding under two names. Such a tensor says nothing new only as long as it has the value that
the model computes. With another value the folder is of another model, so each value is compared.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from megatron_rlvr.megatron.huggingface_config import is_tied
from megatron_rlvr.megatron.rotary import inverse_frequencies
from megatron_rlvr.weights.huggingface_folder import read_tensor

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_FREQUENCIES = re.compile(r"model\.(?:layers\.\d+\.self_attn\.)?rotary_emb\.(?:original_)?inv_freq")
_POSITIONS = re.compile(r"(?:model\.)?(?:embeddings\.)?position_ids")
_MASKS = re.compile(r"model\.(?:causal_mask|layers\.\d+\.self_attn\.bias)")
_MASK_VALUES = re.compile(r"model\.layers\.\d+\.self_attn\.masked_bias")
_ROWS = 8192
_RELATIVE_ERRORS = {torch.float16: 2e-3, torch.bfloat16: 1e-2}


def difference(name: str, files: Mapping[str, Path], hf_config: Any) -> str | None:
    """Return how a tensor that the model does not load differs from what the model computes instead.

    Args:
        name: name of a tensor that is no weight of the model.
        files: the file of every tensor.
        hf_config: transformers configuration of the model.

    Returns:
        None if it is equal; a reason for an error if it differs, or is no tensor of this kind.
    """
    if name == HEAD and is_tied(hf_config) and EMBEDDING in files:
        if _equal_rows(files[HEAD], files[EMBEDDING]):
            return None
        return (
            "config.json has tie_word_embeddings=true, but lm_head.weight differs from model.embed_tokens.weight: set "
            "it to false to keep this output layer, or delete lm_head.weight from the folder"
        )
    if _FREQUENCIES.fullmatch(name):
        stored = read_tensor(files[name], name)
        expected = inverse_frequencies(hf_config, torch.device("cpu"))
        error = _RELATIVE_ERRORS.get(stored.dtype, 1e-5)
        if stored.shape == expected.shape and torch.allclose(stored.float(), expected, rtol=error, atol=1e-7):
            return None
        return (
            f"{name} differs from the rotary frequencies that config.json describes: the weights were trained with "
            "another rope_theta or scaling; correct config.json, or delete this tensor if config.json is right"
        )
    if _POSITIONS.fullmatch(name):
        stored = read_tensor(files[name], name).flatten()
        equal = torch.equal(stored.long(), torch.arange(len(stored)))
    elif _MASKS.fullmatch(name):
        stored = read_tensor(files[name], name)
        mask = stored.reshape(stored.shape[-2:]).bool() if stored.dim() >= 2 else stored.new_zeros(0, 1).bool()
        lower = torch.ones_like(mask).tril()
        equal = mask.numel() == stored.numel() > 0 and (torch.equal(mask, lower) or torch.equal(mask, ~lower))
    elif _MASK_VALUES.fullmatch(name):
        equal = bool((read_tensor(files[name], name).float() <= -1e4).all())
    else:
        return f"{name} is not a tensor of {hf_config.model_type}"
    return None if equal else f"{name} is not what the attention of {hf_config.model_type} computes"


def _equal_rows(head: Path, embedding: Path) -> bool:
    """Whether both tensors have the same values; a block of rows at a time, because they are the largest of a model."""
    with safe_open(head, framework="pt") as first, safe_open(embedding, framework="pt") as second:
        ours, theirs = first.get_slice(HEAD), second.get_slice(EMBEDDING)
        return ours.get_shape() == theirs.get_shape() and all(
            torch.equal(ours[row : row + _ROWS].float(), theirs[row : row + _ROWS].float())
            for row in range(0, ours.get_shape()[0], _ROWS)
        )
