"""Forward and backward passes over microbatches, with megatron-core's pipeline schedule."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_rlvr.data.microbatch import Microbatch
from megatron_rlvr.megatron import collectives, cpu_shim, device
from megatron_rlvr.megatron.loss_scale import LossScale
from megatron_rlvr.megatron.model import packed_sequences


def agreed_microbatch_count(count: int, model_chunks: int) -> int:
    """Return the number of microbatches to run, at least `count`, which the pipeline schedule and experts may raise.

    One all-reduce over the job if experts are distributed over ranks, otherwise none.

    Args:
        count: number of microbatches that this data-parallel rank needs.
        model_chunks: number of model chunks per pipeline stage.
    """
    if parallel_state.get_expert_model_parallel_world_size() > 1:
        # An expert computes the tokens of all data-parallel ranks of its group, so these must have equally many
        # microbatches.
        count = int(collectives.max_over_job({"microbatches": count})["microbatches"])
    if model_chunks > 1:
        # The interleaved schedule needs a multiple of the number of stages.
        stages = parallel_state.get_pipeline_model_parallel_world_size()
        count = -(-count // stages) * stages
    return count


def forward_backward(
    wrapped: Sequence[DistributedDataParallel],
    microbatches: Sequence[Microbatch],
    loss: Callable[[Tensor, Microbatch], Tensor],
    *,
    scale: LossScale,
    hidden_only: bool,
    forward_only: bool,
) -> None:
    """Run all microbatches through the pipeline and add the gradients of the summed loss to the gradient buffers.

    Collective over the job.

    Args:
        wrapped: this rank's model chunks in their data-parallel wrappers.
        microbatches: the microbatches; `agreed_microbatch_count` says how many there must be.
        loss: called on the last stage with its output for a microbatch; returns a 0-d tensor.
        scale: factor of the loss.
        hidden_only: return hidden states instead of logits on the last stage.
        forward_only: run no backward pass.
    """
    target = device.device()

    def forward_step(iterator: Iterator[Microbatch], model: torch.nn.Module) -> tuple[Tensor, Callable[[Tensor], Any]]:
        microbatch = next(iterator)
        with cpu_shim.without_shim():
            output = model(
                device.to_device(microbatch.tokens, target),
                device.to_device(microbatch.rows, target),
                positions=None if microbatch.positions is None else device.to_device(microbatch.positions, target),
                packed=packed_sequences(microbatch.boundaries, target, microbatch.longest),
                padding=None if microbatch.padding is None else device.to_device(microbatch.padding, target),
                routes=microbatch.routes,
                hidden_only=hidden_only,
            )

        def scaled_loss(output: Tensor) -> tuple[Tensor, dict]:
            with cpu_shim.without_shim():
                return scale.for_schedule(loss(output, microbatch), len(microbatches)), {}

        return output, scaled_loss

    for chunk in wrapped:
        chunk.train()
    sequences, width = microbatches[0].tokens.shape
    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(microbatches) for _ in wrapped],
        model=list(wrapped),
        num_microbatches=len(microbatches),
        seq_length=width * parallel_state.get_context_parallel_world_size(),
        micro_batch_size=sequences,
        forward_only=forward_only,
    )
