"""Settings of megatron-core's TransformerConfig: those of the model, its family, its layers and the parallel layout."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.nn.functional import silu

from megatron_rlvr.errors import UserError
from megatron_rlvr.megatron import device
from megatron_rlvr.megatron.config import ModelConfig, ParallelConfig
from megatron_rlvr.megatron.families import family_of
from megatron_rlvr.megatron.families.weight_map import head_size_of
from megatron_rlvr.megatron.fusions import fusion_settings
from megatron_rlvr.megatron.huggingface_config import is_mixture
from megatron_rlvr.megatron.rotary import attention_factor


def transformer_settings(
    hf_config: Any, model: ModelConfig, parallel: ParallelConfig, spec_name: str
) -> dict[str, Any]:
    """Return fields of TransformerConfig, by name.

    Args:
        hf_config: transformers configuration of the model.
        model, parallel: sections of the configuration.
        spec_name: the layer spec, ``local`` or ``transformer_engine``.

    Raises:
        UserError: if the model or its layers do not support a setting of `model`.
    """
    dtype = getattr(torch, model.dtype)
    settings: dict[str, Any] = {
        "num_layers": hf_config.num_hidden_layers,
        "hidden_size": hf_config.hidden_size,
        "num_attention_heads": hf_config.num_attention_heads,
        "num_query_groups": hf_config.num_key_value_heads,
        "kv_channels": head_size_of(hf_config),
        "ffn_hidden_size": hf_config.intermediate_size,
        "layernorm_epsilon": hf_config.rms_norm_eps,
        "normalization": "RMSNorm",
        "activation_func": silu,
        "gated_linear_unit": True,
        "add_bias_linear": False,
        # Also of dense models: megatron-core checks it against variable_seq_lengths.
        "moe_token_dispatcher_type": "alltoall",
        "softmax_scale": _softmax_scale(hf_config),
        **family_of(hf_config).settings(hf_config),
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype is torch.bfloat16,
        "tensor_model_parallel_size": parallel.tensor,
        "pipeline_model_parallel_size": parallel.pipeline,
        "num_layers_in_last_pipeline_stage": parallel.last_stage_layers or None,
        "virtual_pipeline_model_parallel_size": parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
        "context_parallel_size": parallel.context,
        "expert_model_parallel_size": parallel.expert,
        "expert_tensor_parallel_size": parallel.expert_tensor,
        "sequence_parallel": parallel.sequence,
        # Microbatches have different lengths, so stages send shapes as well. This costs a message, so it is off without
        # a pipeline.
        "variable_seq_lengths": parallel.pipeline > 1,
        "deallocate_pipeline_outputs": False,
        # The interleaved schedule overlaps its many small transfers with computation.
        "batch_p2p_comm": parallel.virtual_pipeline == 1,
        "overlap_p2p_comm": parallel.virtual_pipeline > 1,
        **_recompute_settings(parallel),
        **_expert_settings(hf_config, model, spec_name),
        **fp8_settings(model, spec_name),
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
    }
    if spec_name == "local":
        settings |= {
            "use_cpu_initialization": not device.on_gpu(),
            "masked_softmax_fusion": False,
            "bias_activation_fusion": False,
            "use_te_activation_func": True,  # makes megatron-core call `GatedActivation` of local_layers.py
            "bias_dropout_fusion": False,
            "apply_rope_fusion": False,
            "persist_layer_norm": False,
            "gradient_accumulation_fusion": False,
        }
    else:
        latent = settings.get("multi_latent_attention", False)
        settings |= fusion_settings(is_mixture(hf_config), model.router_aux_loss, latent)
    return settings


def _softmax_scale(hf_config: Any) -> float | None:
    """Return the factor of attention scores; None means 1 / sqrt(d). YaRN multiplies queries and keys by a factor."""
    factor = attention_factor(hf_config)
    return None if factor == 1.0 else factor**2 / math.sqrt(head_size_of(hf_config))


def _recompute_settings(parallel: ParallelConfig) -> dict[str, Any]:
    """Return settings for activations that the backward pass recomputes."""
    if parallel.recompute == "none":
        return {}
    if parallel.recompute == "full":
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    return {"recompute_granularity": "selective", "recompute_modules": list(parallel.recompute_modules)}


def fp8_settings(model: ModelConfig, spec_name: str) -> dict[str, Any]:
    """Return settings for matrix multiplications in fp8.

    Raises:
        UserError: if `model` requests fp8 and the layers are not those of Transformer Engine.
    """
    if model.fp8 == "none":
        return {}
    if spec_name != "transformer_engine":
        raise UserError(
            f"model.fp8={model.fp8} needs Transformer Engine's layers, on a GPU: set model.fp8=none or "
            "model.layer_spec=transformer_engine"
        )
    return {"fp8": model.fp8, "fp8_recipe": model.fp8_recipe}


def _expert_settings(hf_config: Any, model: ModelConfig, spec_name: str) -> dict[str, Any]:
    """Return settings for a mixture of experts."""
    if not is_mixture(hf_config):
        if model.router_aux_loss:
            raise UserError(
                f"model.router_aux_loss={model.router_aux_loss} but {model.path} has no experts: set it to 0"
            )
        return {}
    return {
        "moe_grouped_gemm": spec_name == "transformer_engine",
        "moe_router_load_balancing_type": "aux_loss" if model.router_aux_loss > 0 else "none",
        "moe_aux_loss_coeff": model.router_aux_loss,
    }
