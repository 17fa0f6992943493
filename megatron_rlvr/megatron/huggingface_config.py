"""Read the config.json of a Hugging Face model, and refuse models that are not supported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_rlvr.errors import UserError

SUPPORTED = ("qwen2", "qwen3", "llama", "qwen3_moe")
"""Model families that are tested against transformers. mbridge supports more."""


def read_config(path: Path) -> Any:
    """Read the transformers configuration of a model folder.

    Raises:
        UserError: if the folder or its config.json is missing, unreadable, or of a model that is not supported.
    """
    from transformers import AutoConfig

    if not path.is_dir():
        raise UserError(
            f"model.path={path} is not a folder: give a Hugging Face model folder with config.json and safetensors"
        )
    if not (path / "config.json").is_file():
        raise UserError(f"{path} has no config.json: give a Hugging Face model folder")
    try:
        config = AutoConfig.from_pretrained(path)
    except Exception as error:  # the validators of transformers raise many types
        reason = " ".join(str(error).split())
        raise UserError(f"{path}/config.json cannot be read: {reason}") from error
    _check_supported(path, config)
    return config


def is_tied(hf_config: Any) -> bool:
    """Whether the vocabulary projection shares its weight with the embedding."""
    return bool(getattr(hf_config, "tie_word_embeddings", False))


def is_mixture(hf_config: Any) -> bool:
    """Whether the feed-forward layers are mixtures of experts."""
    return hf_config.model_type.endswith("_moe")


def _check_supported(path: Path, config: Any) -> None:
    """Refuse configurations that would load but compute a different model."""
    if config.model_type not in SUPPORTED:
        raise UserError(f"{path}: model_type {config.model_type!r} is not supported: use one of {', '.join(SUPPORTED)}")
    rope = config.rope_parameters
    settings: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "rope_type": (rope["rope_type"], ("default", "llama3")),
        "partial_rotary_factor": (rope.get("partial_rotary_factor", 1.0), (1.0,)),
        "hidden_act": (config.hidden_act, ("silu",)),
        "use_sliding_window": (getattr(config, "use_sliding_window", False), (False,)),
        "attention_bias": (getattr(config, "attention_bias", False), (False,)),
        "mlp_bias": (getattr(config, "mlp_bias", False), (False,)),
    }
    if is_mixture(config):
        settings |= {
            "norm_topk_prob": (config.norm_topk_prob, (True,)),
            "decoder_sparse_step": (config.decoder_sparse_step, (1,)),
            "mlp_only_layers": (config.mlp_only_layers, ([], None)),
        }
    for key, (value, supported) in settings.items():
        if value not in supported:
            raise UserError(
                f"{path}/config.json: {key}={value!r} is not supported: use a model with "
                f"{' or '.join(map(repr, supported))}"
            )
