"""Adapt mbridge, the library that maps weights between Hugging Face and megatron-core, to this project.

mbridge expects Transformer Engine's layers and sets fields of TransformerConfig itself. The mixins here change its
class for a model family so that this project's settings take precedence and the names of local layers are mapped.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_rlvr.megatron.huggingface_config import is_mixture, is_tied
from megatron_rlvr.megatron.model import PolicyModel

with warnings.catch_warnings():  # mbridge imports all its families, and some warn about missing optional packages
    warnings.simplefilter("ignore")
    from mbridge.core.bridge import _MODEL_REGISTRY as MBRIDGE_FAMILIES
    from mbridge.core.bridge import Bridge


def open_mbridge(hf_config: Any, dtype: torch.dtype, spec_name: str, settings: dict[str, Any]) -> Bridge:
    """Return mbridge's bridge of a model.

    Args:
        hf_config: transformers configuration of the model.
        dtype: dtype of the weights.
        spec_name: the layer spec, ``local`` or ``transformer_engine``.
        settings: fields of TransformerConfig that take precedence over those of the model family.
    """
    family = MBRIDGE_FAMILIES[hf_config.model_type]
    local_names = (_LocalNames,) if spec_name == "local" else ()
    bases = (_WithSettings, *local_names, family)
    return type(f"Policy{family.__name__}", bases, {"_settings": settings})(hf_config, dtype=dtype)


class _WithSettings:
    """Makes `_settings` take precedence over the settings of the family."""

    _settings: dict[str, Any]
    _DIRECT_MAPPING: dict[str, str]
    hf_config: Any

    def _build_base_config(self, *args: Any, **kwargs: Any) -> TransformerConfig:
        return super()._build_base_config(*args, **{**kwargs, **self._settings})  # type: ignore[misc]

    def _adjust_mapping_for_shared_weights(self) -> None:
        # mbridge does this only for Qwen, and changes the mapping of the class: after a tied model, every untied model
        # that the process opens would be mapped as tied. This changes a copy, for every family.
        self._DIRECT_MAPPING = dict(self._DIRECT_MAPPING)
        if is_tied(self.hf_config):
            self._DIRECT_MAPPING["output_layer.weight"] = self._DIRECT_MAPPING["embedding.word_embeddings.weight"]


class _LocalNames:
    """Maps the weight names of local layers.

    Their norms are separate modules. Transformer Engine fuses a norm and the linear layer that follows it.
    """

    hf_config: Any

    def _weight_name_mapping_mcore_to_hf(self, name: str) -> list[str]:
        if name.startswith("decoder.layers."):
            name = name.replace(".input_layernorm.weight", ".self_attention.linear_qkv.layer_norm_weight")
            if not is_mixture(self.hf_config):
                name = name.replace(".pre_mlp_layernorm.weight", ".mlp.linear_fc1.layer_norm_weight")
        return super()._weight_name_mapping_mcore_to_hf(name)  # type: ignore[misc]


def grouped_expert_name(name: str) -> str:
    """Return the name of a local expert's weight in Transformer Engine's grouped experts; other names are unchanged.

    mbridge maps only grouped experts.
    """
    return re.sub(r"\.experts\.local_experts\.(\d+)\.(linear_fc\d)\.weight$", r".experts.\2.weight\1", name)


class _GroupedExperts:
    """A model with local experts, with weights under the names of grouped experts."""

    def __init__(self, model: PolicyModel):
        self.model = model
        self.decoder = model.decoder

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {grouped_expert_name(name): tensor for name, tensor in self.model.state_dict().items()}

    def named_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        return ((grouped_expert_name(name), parameter) for name, parameter in self.model.named_parameters())


def with_mbridge_names(model: PolicyModel) -> PolicyModel | _GroupedExperts:
    """Return the model with the weight names that mbridge expects."""
    has_local_experts = any(".local_experts." in name for name, _ in model.named_parameters())
    return _GroupedExperts(model) if has_local_experts else model
