"""Model families: how a Hugging Face model is built from megatron-core's layers, one declarative table per family."""

from __future__ import annotations

from typing import Any

from megatron_rlvr.megatron.families.deepseek_v3 import DEEPSEEK_V3
from megatron_rlvr.megatron.families.dense import LLAMA, QWEN2, QWEN3
from megatron_rlvr.megatron.families.family import Family
from megatron_rlvr.megatron.families.gemma3 import GEMMA3
from megatron_rlvr.megatron.families.glm4_moe import GLM4_MOE
from megatron_rlvr.megatron.families.mixtures import MIXTRAL, QWEN3_MOE

FAMILIES: dict[str, Family] = {
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "llama": LLAMA,
    "gemma3_text": GEMMA3,
    "qwen3_moe": QWEN3_MOE,
    "mixtral": MIXTRAL,
    "glm4_moe": GLM4_MOE,
    "deepseek_v3": DEEPSEEK_V3,
}
"""Families by the ``model_type`` of config.json. Each is tested against transformers."""


def family_of(hf_config: Any) -> Family:
    """Return the family of a model that `megatron_rlvr.megatron.huggingface_config.read_config` has accepted."""
    return FAMILIES[hf_config.model_type]
