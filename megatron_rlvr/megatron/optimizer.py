"""Build megatron-core's data-parallel wrapper and optimizer from the configuration."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared
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
        model_config: configuration of the model. The function that scales its loss is set here; `Policy.update` sets
            the one that reduces gradients (`finalize_gradients_with`).
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
    for single in chained_optimizers(optimizer):
        _check_copies_in_norm(single)
    model_config.grad_scale_func = optimizer.scale_loss if half_precision else None
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


def finalize_gradients_with(mark: Callable[[], torch.Tensor]) -> Callable[..., None]:
    """Return megatron-core's `finalize_model_grads`, preceded by adding `mark()` to one element of the gradient.

    A mark of NaN reaches every rank with the reduction of the gradients, and so the norm that `take_step` checks: no
    collective and no wait of the host are needed to agree that the loss of some rank was not finite.

    Args:
        mark: called after the last backward pass; returns 0 or NaN, a tensor of one element.
    """

    def finalize(model_chunks: Sequence[DistributedDataParallel], *arguments: Any, **settings: Any) -> None:
        # Those of experts are the only ones if no other module has an adapter.
        element = [*model_chunks[-1].buffers, *model_chunks[-1].expert_parallel_buffers][0].grad_data[:1]
        element.add_(mark().to(element.dtype))
        finalize_model_grads(model_chunks, *arguments, **settings)

    return finalize


@torch.no_grad()
def take_step(optimizer: MegatronOptimizer) -> tuple[float, bool]:
    """Clip the gradient and step, unless the norm of the gradient is not finite. Collective over the job.

    megatron-core's `step` multiplies the gradient by 0 if the norm is infinite, and by NaN if it is NaN. Here, such a
    step leaves weights, moments and step counts as they are, on every rank: the norm is of the whole reduced gradient.

    Returns:
        the norm before clipping, and whether the step was taken.
    """
    optimizer.prepare_grads()
    norm = float(optimizer.get_grad_norm())  # megatron-core reads it on the host to clip by it
    if not math.isfinite(norm):
        return norm, False
    for single in chained_optimizers(optimizer):
        if parameters := single.get_parameters():
            clip_grad_by_total_norm_fp32(
                parameters,
                max_norm=single.config.clip_grad,
                total_norm=norm,
                use_decoupled_grad=single.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8,
            )
    optimizer.step_with_ready_grads()
    return norm, True


def _check_copies_in_norm(single: MegatronOptimizer) -> None:
    """Make the norm of the gradient NaN if a gradient that it leaves out is not finite.

    The norm counts a weight once that several ranks hold (norms under tensor parallelism, tied embeddings). A copy that
    is not finite on one rank alone would pass unseen, and ruin the weight there.
    """
    counted = single.get_main_grads_for_grad_norm
    decoupled = single.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8

    def with_mark() -> list[torch.Tensor]:
        copies = [
            gradient
            for parameter in single.get_parameters()
            if (gradient := getattr(parameter, "decoupled_grad" if decoupled else "grad", None)) is not None
            and not (
                param_is_not_shared(parameter)
                and param_is_not_tensor_parallel_duplicate(parameter, getattr(single, "tp_group", None))
            )
        ]
        mark = [torch.nn.utils.get_total_norm(copies).float()[None] * 0.0] if copies else []
        return [*counted(), *mark]  # 0 changes no norm

    single.get_main_grads_for_grad_norm = with_mark


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
