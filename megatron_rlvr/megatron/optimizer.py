"""Build megatron-core's data-parallel wrapper and optimizer from the configuration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_rlvr.errors import UserError
from megatron_rlvr.megatron import device
from megatron_rlvr.megatron.config import OptimizerConfig
from megatron_rlvr.megatron.model import PolicyModel


def wrap_data_parallel(
    model_chunks: Sequence[PolicyModel], config: TransformerConfig, *, distributed_optimizer: bool
) -> list[DistributedDataParallel]:
    """Wrap every model chunk with float32 gradient buffers that are reduced over data- and context-parallel ranks.

    Collective over the job: the weights of the first data-parallel rank are broadcast to the others.

    Args:
        model_chunks: this rank's model chunks.
        config: configuration of the model.
        distributed_optimizer: whether the optimizer state will be sharded over data-parallel ranks.
    """
    settings = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=distributed_optimizer)
    # As in megatron-core's training loop: buckets shorten the critical path, and only the first chunk is on it.
    wrapped = [
        DistributedDataParallel(config, settings, chunk, disable_bucketing=number > 0)
        for number, chunk in enumerate(model_chunks)
    ]
    for chunk in wrapped:
        chunk.broadcast_params()
    return wrapped


def build_optimizer(
    wrapped: Sequence[DistributedDataParallel],
    optimizer_config: OptimizerConfig,
    model_config: TransformerConfig,
    *,
    distributed: bool,
) -> MegatronOptimizer:
    """Build AdamW for the wrapped model chunks. Weight decay applies to matrices, and not to norms and biases.

    Args:
        wrapped: result of `wrap_data_parallel`.
        optimizer_config: section ``optimizer`` of the configuration.
        model_config: configuration of the model. Its fields for gradient scaling and reduction, which the pipeline
            schedule reads, are set here.
        distributed: shard the state over data-parallel ranks.

    Raises:
        UserError: if CPU offload is requested without a GPU.
    """
    dtype = model_config.params_dtype
    half_precision = dtype != torch.float32
    optimizer = get_megatron_optimizer(
        MegatronOptimizerConfig(
            optimizer="adam",
            lr=optimizer_config.learning_rate,
            weight_decay=optimizer_config.weight_decay,
            adam_beta1=optimizer_config.beta1,
            adam_beta2=optimizer_config.beta2,
            adam_eps=optimizer_config.epsilon,
            clip_grad=optimizer_config.clip_grad,
            bf16=half_precision,
            params_dtype=dtype,
            use_distributed_optimizer=distributed,
            **_offload_settings(optimizer_config),
        ),
        list(wrapped),
        use_gloo_process_groups=distributed,
    )
    _fuse_adam(optimizer)
    _exempt_from_weight_decay(optimizer, optimizer_config.weight_decay)
    model_config.grad_scale_func = optimizer.scale_loss if half_precision else None
    model_config.finalize_model_grads_func = finalize_model_grads
    return optimizer


def chained_optimizers(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    """Return the optimizers of dense and of expert parameters, or the only optimizer in a list."""
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def set_learning_rate(optimizer: MegatronOptimizer, value: float) -> None:
    """Set the learning rate of all parameters, times the ``lr_mult`` of their group as in megatron-core's scheduler."""
    for group in optimizer.param_groups:
        group["lr"] = value * group.get("lr_mult", 1.0)


def _exempt_from_weight_decay(optimizer: MegatronOptimizer, value: float) -> None:
    """Set the weight decay of all parameters, times the ``wd_mult`` of their group: 0 for vectors and biases.

    megatron-core only marks the groups. Its learning-rate scheduler, which this project does not use, would carry the
    marks out.
    """
    for group in optimizer.param_groups:
        group["weight_decay"] = value * group.get("wd_mult", 1.0)


def _fuse_adam(optimizer: MegatronOptimizer) -> None:
    """Select the fused kernel of torch's Adam, which passes over the parameters once instead of ten times.

    On a GPU this also saves a float32 copy of all parameters. With Transformer Engine, its own Adam is used instead.
    """
    for single in chained_optimizers(optimizer):
        if isinstance(single.optimizer, torch.optim.Adam):
            for group in single.optimizer.param_groups:
                group["foreach"], group["fused"] = False, True


def _offload_settings(config: OptimizerConfig) -> dict[str, Any]:
    """Return megatron-core's settings for an optimizer that keeps part of its state in host memory.

    Raises:
        UserError: on a machine without a GPU.
    """
    if not config.cpu_offload:
        return {}
    if not device.on_gpu():
        raise UserError(f"optimizer.cpu_offload={config.cpu_offload} needs a GPU: set it to 0")
    return {
        "optimizer_cpu_offload": True,
        "optimizer_offload_fraction": config.cpu_offload,
        "use_precision_aware_optimizer": True,
        "overlap_cpu_optimizer_d2h_h2d": True,
    }
