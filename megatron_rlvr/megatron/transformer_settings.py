"""megatron-core's TransformerConfig settings that follow from our configuration, not from the model family."""

from __future__ import annotations

from typing import Any

from megatron_rlvr.errors import UserError
from megatron_rlvr.megatron import device
from megatron_rlvr.megatron.config import ModelConfig, ParallelConfig
from megatron_rlvr.megatron.huggingface_config import is_mixture


def transformer_settings(
    hf_config: Any, model: ModelConfig, parallel: ParallelConfig, spec_name: str
) -> dict[str, Any]:
    """Fields of TransformerConfig by name; they win over what the model family sets.

    Args:
        hf_config: configuration of the Hugging Face model.
        model, parallel: sections of our configuration.
        spec_name: the layer spec, ``local`` or ``transformer_engine``.

    Raises:
        UserError: if the model or its layers cannot do what `model` asks for.
    """
    settings: dict[str, Any] = {
        "sequence_parallel": parallel.sequence,
        # Microbatches of one pipeline step have different lengths, so stages send shapes along. That costs a message,
        # so a model without a pipeline does not do it.
        "variable_seq_lengths": parallel.pipeline > 1,
        "deallocate_pipeline_outputs": False,
        # The interleaved schedule hides its many small transfers behind computation.
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
            "use_te_activation_func": True,  # makes megatron-core call the activation of local_layers.py
            "bias_dropout_fusion": False,
            "apply_rope_fusion": False,
            "persist_layer_norm": False,
            "gradient_accumulation_fusion": False,
        }
    return settings


def _recompute_settings(parallel: ParallelConfig) -> dict[str, Any]:
    """What the backward pass recomputes instead of keeping."""
    if parallel.recompute == "none":
        return {}
    if parallel.recompute == "full":
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    return {"recompute_granularity": "selective", "recompute_modules": list(parallel.recompute_modules)}


def fp8_settings(model: ModelConfig, spec_name: str) -> dict[str, Any]:
    """Matrix products in fp8, which Transformer Engine computes.

    Raises:
        UserError: for local layers.
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
    """What a mixture of experts needs beyond the family's settings."""
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
