"""Rotary position embeddings (RoPE, arXiv 2104.09864) as a model's config.json describes them.

Most models rotate all layers by the same angles. Gemma 3 has two kinds of layers with different angles. The model then
computes both, side by side in the last dimension, and each layer takes its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatron_rlvr.megatron.families.weight_map import head_size_of

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3")
"""Supported types. ``dynamic`` differs from ``default`` only beyond the context length, which no sequence exceeds."""


def rope_parameters(hf_config: Any) -> dict[str | None, Mapping[str, Any]]:
    """Return the parameters of RoPE by kind of layer; the one kind of most models is None."""
    parameters = hf_config.rope_parameters
    kinds = sorted(set(getattr(hf_config, "layer_types", None) or ()))
    # To parameters without kinds, transformers adds those of Gemma 3's kinds, and computes with these.
    if "rope_type" in parameters and not any(kind in parameters for kind in kinds):
        return {None: parameters}
    return {kind: parameters.get(kind) for kind in kinds}


def partial_factor(parameters: Mapping[str, Any]) -> float:
    """Return the fraction of a head that is rotated."""
    factor = parameters.get("partial_rotary_factor")
    return 1.0 if factor is None else float(factor)


def inverse_frequencies(hf_config: Any, device: torch.device) -> Tensor:
    """Return the inverse frequencies of every kind of layer, end to end: float32 [kinds * d / 2]."""
    return torch.cat([_initialize(hf_config, kind, device)[0] for kind in rope_parameters(hf_config)])


def attention_factor(hf_config: Any) -> float:
    """Return the factor of queries and keys in YaRN (arXiv 2309.00071, section 3.4); 1 for the other types."""
    return max(_initialize(hf_config, kind, torch.device("cpu"))[1] for kind in rope_parameters(hf_config))


def angles_of_kind(angles: Tensor, kind: int, kinds: int) -> Tensor:
    """Return the angles [..., d] of one kind of layer from those of all kinds [..., kinds * d].

    megatron-core repeats its frequencies, so `angles` has the first halves of all kinds and then the second halves.
    """
    return angles if kinds == 1 else angles.unflatten(-1, (2, kinds, -1))[..., kind, :].flatten(-2)


def _initialize(hf_config: Any, kind: str | None, device: torch.device) -> tuple[Tensor, float]:
    parameters = rope_parameters(hf_config)[kind]
    if parameters["rope_type"] in ("default", "dynamic"):
        size = int(head_size_of(hf_config) * partial_factor(parameters))
        exponents = torch.arange(0, size, 2, dtype=torch.float32, device=device) / size
        return 1.0 / parameters["rope_theta"] ** exponents, 1.0
    frequencies, factor = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](hf_config, device, layer_type=kind)
    return frequencies, factor
