"""Read the config.json of a Hugging Face model, and refuse models that are not supported."""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import Any

from megatron_rlvr.checked_input import InvalidInputError, checked, describe, field, one_line, read_json
from megatron_rlvr.errors import UserError
from megatron_rlvr.megatron.families import FAMILIES, family_of
from megatron_rlvr.megatron.rotary import ROPE_TYPES, attention_factor, partial_factor, rope_parameters

_FLAGS = ("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window", "norm_topk_prob", "use_qk_norm")
_SIZES = {
    "vocab_size": (2, 2**24),
    "hidden_size": (1, 2**20),
    "intermediate_size": (1, 2**22),
    "moe_intermediate_size": (1, 2**22),
    "num_hidden_layers": (1, 2**12),
    "num_attention_heads": (1, 2**14),
    "num_key_value_heads": (1, 2**14),
    "head_dim": (1, 2**14),
    "q_lora_rank": (1, 2**16),
    "kv_lora_rank": (1, 2**16),
    "qk_nope_head_dim": (1, 2**14),
    "qk_rope_head_dim": (2, 2**14),
    "v_head_dim": (1, 2**14),
    "num_experts": (1, 2**14),
    "n_routed_experts": (1, 2**14),
    "n_shared_experts": (1, 2**10),
    "n_group": (1, 2**10),
    "topk_group": (1, 2**10),
    "first_k_dense_replace": (0, 2**12),
    "num_experts_per_tok": (1, 2**14),
    "max_position_embeddings": (1, 2**31),
    "sliding_window": (1, 2**31),
    "query_pre_attn_scalar": (1, 2**20),
}
_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_NUMBERS = {
    "rms_norm_eps": (1e-12, 1.0),
    "initializer_range": (0.0, 100.0),
    "router_aux_loss_coef": (0.0, 1e6),
    "routed_scaling_factor": (1e-6, 1e6),
}
_ROPE = {
    "rope_theta": (1.0, 1e12),
    "partial_rotary_factor": (0.01, 1.0),
    "factor": (1.0, 1e6),
    "low_freq_factor": (1e-6, 1e6),
    "high_freq_factor": (1e-6, 1e6),
    "original_max_position_embeddings": (1, 2**31),
    "beta_fast": (1e-3, 1e6),
    "beta_slow": (1e-3, 1e6),
    "attention_factor": (1e-3, 1e3),
    "mscale": (0.0, 1e3),
    "mscale_all_dim": (0.0, 1e3),
}

_SAME_AS = {"kimi_k2": "deepseek_v3"}
"""Model types that have the layers and the keys of config.json of a type that transformers knows."""
_REASONS = {
    "gpt_oss": "its attention has sinks, and one tensor holds all experts of a layer",
    "deepseek_v2": "its router weighs experts by a softmax",
    "deepseek_v32": "its attention is sparse",
    "glm_moe_dsa": "its attention is sparse",
    "kimi_k25": "it is multimodal",
}
"""Why models that are near supported ones are refused."""


def read_config(path: Path, quantized: bool = False) -> Any:
    """Read the transformers configuration of a model folder.

    Args:
        path: the folder.
        quantized: also accept a folder whose weights are quantized.

    Raises:
        UserError: if the folder or its config.json is missing, unreadable, or of a model that is not supported.
    """
    from transformers import AutoConfig

    if not os.path.isdir(path):  # noqa: PTH112, Path.is_dir raises for a name that is too long
        raise UserError(
            f"model.path={path} is not a folder: give a Hugging Face model folder with config.json and safetensors"
        )
    if not (path / "config.json").is_file():
        raise UserError(f"{path} has no config.json: give a Hugging Face model folder")
    file = path / "config.json"
    settings = read_json(file, remedy="download the model again")
    named = settings.get("model_type")
    model_type = _SAME_AS.get(named, named) if isinstance(named, str) else named
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        shown = describe(model_type).removeprefix("str ")
        known = (*FAMILIES, *_SAME_AS)
        near = difflib.get_close_matches(str(model_type), known, n=1)
        reason = _REASONS.get(str(model_type))
        if reason is None and "vision_config" in settings:
            reason = "it is multimodal, and text models alone are trained"
        why = (f", because {reason}" if reason else "") + (f" (the nearest is {near[0]})" if near else "")
        raise UserError(
            f"{path}: model_type {shown} is not supported{why}: use one of {', '.join(known)}. Python code in a model "
            "folder is never run"
        )
    try:
        if named == model_type:
            config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        else:
            config = AutoConfig.for_model(**settings | {"model_type": model_type})
    except Exception as error:  # the validators of transformers raise many types
        raise UserError(f"{file} cannot be read: {one_line(error)}") from error
    try:
        _check_values(config)
    except InvalidInputError as error:
        raise UserError(f"{file}: {error}: download the model again") from error
    if not quantized:
        _check_not_quantized(path, config)
    _check_supported(path, config)
    return config


def _check_values(config: Any) -> None:
    """Refuse values that no model has. transformers accepts some of them, and building the model would fail or hang.

    Raises:
        InvalidInputError: for the first of them.
    """
    for name, (low, high) in _SIZES.items():
        if getattr(config, name, None) is not None:
            checked(getattr(config, name), int, name, at_least=low, at_most=high)
    for name in (*_REQUIRED, *family_of(config).sizes):
        checked(getattr(config, name, None), int, name)
    for name in _FLAGS:
        if getattr(config, name, None) is not None:
            checked(getattr(config, name), bool, name)
    checked(config.rope_parameters, dict, "rope_parameters")
    kinds = [checked(rope, dict, "rope_parameters") for rope in rope_parameters(config).values()]
    for names, values in ((_NUMBERS, config.to_dict()), *((_ROPE, rope) for rope in kinds)):
        for name, (least, most) in names.items():
            if values.get(name) is not None:
                checked(values[name], float, name, at_least=least, at_most=most)
    for rope in kinds:
        field(rope, "rope_theta", float)
        field(rope, "rope_type", str)
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    if heads % groups:
        raise InvalidInputError(f"num_key_value_heads={groups} does not divide num_attention_heads={heads}")
    if getattr(config, "head_dim", None) is None and config.hidden_size % heads:
        raise InvalidInputError(f"num_attention_heads={heads} does not divide hidden_size={config.hidden_size}")
    if error := family_of(config).size_error(config):
        raise InvalidInputError(error)
    if is_mixture(config):
        sizes = family_of(config).settings(config)
        if sizes["moe_router_topk"] > sizes["num_moe_experts"]:
            raise InvalidInputError(
                f"num_experts_per_tok={sizes['moe_router_topk']} is more than the {sizes['num_moe_experts']} experts"
            )


def is_tied(hf_config: Any) -> bool:
    """Whether the vocabulary projection shares its weight with the embedding."""
    return bool(getattr(hf_config, "tie_word_embeddings", False))


def is_mixture(hf_config: Any) -> bool:
    """Whether the feed-forward layers are mixtures of experts."""
    return family_of(hf_config).mixture


def _check_not_quantized(path: Path, config: Any) -> None:
    quantization = getattr(config, "quantization_config", None)
    if quantization is None:
        return
    remedy = "use the model before its quantization, in float32 or bfloat16"
    if isinstance(quantization, dict) and quantization.get("weight_block_size"):
        remedy += f", or convert it with tools/convert_checkpoint.py from-fp8 {path} {path}-bf16"
    raise UserError(f"{path}/config.json: quantization_config says that the weights are quantized: {remedy}")


def _check_supported(path: Path, config: Any) -> None:
    """Refuse configurations that would load but compute a different model."""
    settings: dict[str, tuple[Any, tuple[Any, ...]]] = dict(family_of(config).supported(config))
    for rope in rope_parameters(config).values():
        settings |= {
            "rope_type": (rope["rope_type"], ROPE_TYPES),
        }
        if not family_of(config).partial_rotary:
            settings["partial_rotary_factor"] = (partial_factor(rope), (1.0,))
        for key, (value, supported) in settings.items():
            _check_value(path, key, value, supported)
    _check_attention_factor(path, config)


def _check_attention_factor(path: Path, config: Any) -> None:
    """Refuse YaRN where its factor of queries and keys is not one factor of all attention scores."""
    parameters = rope_parameters(config).values()
    own_scale = family_of(config).settings(config).get("softmax_scale") is not None
    if not own_scale and all(partial_factor(rope) == 1.0 for rope in parameters):
        return
    if (factor := attention_factor(config)) != 1.0:
        raise UserError(
            f"{path}/config.json: rope_type='yarn' multiplies the rotated queries and keys by {factor:.4g}, which the "
            f"attention of {config.model_type} does not compute: use a model with another rope_type"
        )


def _check_value(path: Path, key: str, value: Any, supported: tuple[Any, ...]) -> None:
    if value not in supported:
        raise UserError(
            f"{path}/config.json: {key}={value!r} is not supported: use a model with "
            f"{' or '.join(map(repr, supported))}"
        )
