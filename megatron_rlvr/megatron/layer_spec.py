"""The choice between Transformer Engine's layers and megatron-core's local layers."""

from __future__ import annotations

import torch
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_layer_local_spec,
)
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor
from torch.nn.functional import rms_norm

from megatron_rlvr.errors import UserError, first_line
from megatron_rlvr.megatron import device
from megatron_rlvr.megatron.attention import SDPAttention
from megatron_rlvr.megatron.families import Family
from megatron_rlvr.megatron.latent_attention import LatentAttention, LatentProjection
from megatron_rlvr.megatron.local_layers import GatedActivation, LocalSelfAttention
from megatron_rlvr.megatron.post_norms import add_post_norms

if not hasattr(moe_utils, "te_general_gemm"):
    # megatron-core 0.16 defines this only if Transformer Engine is installed, but always reads it.
    moe_utils.te_general_gemm = None


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm with support for sequence parallelism, which megatron-core's WrappedTorchNorm refuses.

    Under sequence parallelism, each rank computes the gradient of the weight from its tokens only. The attribute
    `sequence_parallel` of the weight makes `finalize_model_grads` sum these gradients over the tensor-parallel group.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_unused: object):
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype, device=device.device())
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.zero_centered = config.layernorm_zero_centered_gamma

    def forward(self, x: Tensor) -> Tensor:
        if not self.zero_centered:
            return super().forward(x)
        # In float32, because 1 + weight loses bits of a bf16 weight.
        return rms_norm(x.float(), self.normalized_shape, 1.0 + self.weight.float(), self.eps).type_as(x)


def check_installed(name: str) -> None:
    """Refuse the layer spec ``transformer_engine`` if Transformer Engine is not installed or cannot be loaded.

    Raises:
        UserError: if it is not; says how to install it.
    """
    if name != "transformer_engine":
        return
    remedy = "run `make setup-gpu`, or set model.layer_spec=local"
    try:
        import transformer_engine.pytorch  # noqa: F401
    except ModuleNotFoundError as error:
        missing = "which is not installed" if error.name == "transformer_engine" else f"whose {error.name} is missing"
        raise UserError(f"model.layer_spec={name} needs Transformer Engine, {missing}: {remedy}") from None
    except Exception as error:  # an AssertionError if its packages disagree, an OSError or ImportError of a library
        raise UserError(
            f"model.layer_spec={name} needs Transformer Engine, which does not load: {first_line(error)}: {remedy}"
        ) from error


def layer_spec(
    config: TransformerConfig, name: str, family: Family, vp_stage: int | None = None, *, fused_norms: bool = True
) -> TransformerBlockSubmodules:
    """Return megatron-core's block spec for this pipeline stage.

    Args:
        config: configuration of the model.
        name: ``local`` or ``transformer_engine``.
        family: family of the model.
        vp_stage: the virtual pipeline stage, if there are several.
        fused_norms: whether Transformer Engine may compute a norm and the linear layer after it in one module, whose
            input is not that of the linear layer. Adapters need the latter.
    """
    if name == "transformer_engine":
        block = get_gpt_decoder_block_spec(config, use_transformer_engine=True, vp_stage=vp_stage)
        for layer in {id(layer): layer for layer in block.layer_specs}.values():  # layers share their spec
            if config.multi_latent_attention:
                layer.submodules.self_attention.module = LatentAttention
            if not fused_norms:
                _separate_norms(layer)
            if family.post_norms:
                from megatron.core.extensions.transformer_engine import TENorm

                add_post_norms(layer, TENorm)
        return block
    dense, mixture = _local_layer(config, family, None), _local_layer(config, family, config.num_moe_experts)
    first = get_transformer_layer_offset(config, vp_stage=vp_stage)
    count = get_num_layers_to_build(config, vp_stage=vp_stage)
    kinds = config.moe_layer_freq if isinstance(config.moe_layer_freq, list) else [1] * config.num_layers
    layers = [mixture if kind else dense for kind in kinds[first : first + count]]
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=RMSNorm)


def _separate_norms(layer: ModuleSpec) -> None:
    """Change the spec of a layer of Transformer Engine so that a norm is not part of the linear layer after it.

    With frozen weights this costs no memory: the norm keeps its input, and the adapter the output of the norm.
    """
    from megatron.core.extensions.transformer_engine import (
        TEColumnParallelLinear,
        TELayerNormColumnParallelLinear,
        TENorm,
    )

    attention, mlp = layer.submodules.self_attention.submodules, layer.submodules.mlp.submodules
    for norm, norm_owner, linear, linear_owner in (
        ("input_layernorm", layer.submodules, "linear_qkv", attention),
        ("q_layernorm", attention, "linear_q_up_proj", attention),
        ("kv_layernorm", attention, "linear_kv_up_proj", attention),
        ("pre_mlp_layernorm", layer.submodules, "linear_fc1", mlp),
    ):
        if getattr(linear_owner, linear, None) is TELayerNormColumnParallelLinear:
            setattr(linear_owner, linear, TEColumnParallelLinear)
            setattr(norm_owner, norm, TENorm)


def _checkpoint_names(latent: bool, mixture: bool) -> dict[str, str]:
    """Return the names of norms in a checkpoint: those of Transformer Engine, which fuses some with a projection."""
    attention = "self_attention."
    if latent:
        names = {f"{attention}{x}_layernorm.": f"{attention}linear_{x}_up_proj.layer_norm_" for x in ("q", "kv")}
    else:
        names = {"input_layernorm.": f"{attention}linear_qkv.layer_norm_"}
    return names if mixture else names | {"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}


def _local_layer(config: TransformerConfig, family: Family, experts: int | None) -> ModuleSpec:
    """Return the spec of a local layer, with a mixture of `experts` or a dense feed-forward layer (None)."""
    latent = config.multi_latent_attention
    layer = get_gpt_layer_local_spec(
        num_experts=experts,
        qk_layernorm=config.qk_layernorm,
        multi_latent_attention=latent,
        normalization=config.normalization,
    )
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
    layer.submodules.self_attention.module = LatentAttention if latent else LocalSelfAttention
    feed_forward = layer.submodules.mlp.submodules
    for part in (feed_forward.experts, feed_forward.shared_experts) if experts else ():
        part.submodules.activation_func = GatedActivation
    if not experts:
        feed_forward.activation_func = GatedActivation
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = SDPAttention
    if config.qk_layernorm:
        attention.q_layernorm = RMSNorm
        setattr(attention, "kv_layernorm" if latent else "k_layernorm", RMSNorm)
    if latent:
        attention.linear_q_down_proj = attention.linear_kv_down_proj = LatentProjection
    layer.submodules.sharded_state_dict_keys_map = _checkpoint_names(latent, experts is not None)
    if family.post_norms:
        add_post_norms(layer, RMSNorm)
    return layer
