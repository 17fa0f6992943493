"""Collectives of the training loop and of the local rollout engine.

Each docstring names the processes that must call the function together and the messages that it sends. The backend is
NCCL on a GPU and gloo on the CPU. A process must not wait here for another that waits for a server, a verifier or a
disk: see `waiting`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_rlvr.megatron import device

# ---- the job: all processes ----


def sum_over_job(sums: Mapping[str, float], contributes: bool) -> dict[str, float]:
    """Sum values by name over the contributing processes of the job. One all-reduce of len(sums) float64.

    Each data-parallel rank must contribute once. Pass ``contributes=layout.is_leader`` for values that the leader
    knows, and ``contributes=layout.is_reporting_rank`` for values that the last pipeline stage computes.

    Args:
        sums: values by name, with the same names on every process.
        contributes: whether the values of this process are included.
    """
    names = sorted(sums)
    values = torch.tensor([sums[n] if contributes else 0.0 for n in names], dtype=torch.float64, device=device.device())
    dist.all_reduce(values)
    return dict(zip(names, values.tolist(), strict=True))


def sum_tensor_over_job(values: Tensor, contributes: bool) -> Tensor:
    """Like `sum_over_job`, for a float64 tensor of the same shape on every process; returns a CPU tensor."""
    total = (values if contributes else torch.zeros_like(values)).to(device.device())
    dist.all_reduce(total)
    return total.cpu()


def max_over_job(maxima: Mapping[str, float]) -> dict[str, float]:
    """Return the maximum over the processes of the job, for each name. One all-reduce of len(maxima) float64."""
    names = sorted(maxima)
    values = torch.tensor([maxima[n] for n in names], dtype=torch.float64, device=device.device())
    dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return dict(zip(names, values.tolist(), strict=True))


# ---- one model replica: the processes that work on the same sequences ----


def broadcast_from_last_stage(values: Tensor) -> None:
    """Overwrite `values` with the values of the last pipeline stage, from the last rank of the model-parallel group.

    One broadcast over the model-parallel group; none if it has one member.
    """
    group = parallel_state.get_model_parallel_group()
    if group.size() > 1:
        dist.broadcast(values, src=dist.get_process_group_ranks(group)[-1], group=group)


def object_from_last_stage(value: Any) -> Any:
    """Return the `value` (any picklable object) of the last rank of the model-parallel group, on every rank of it.

    Two broadcasts, of the size and of the bytes; none if the group has one member.
    """
    group = parallel_state.get_model_parallel_group()
    objects = [value]
    if group.size() > 1:
        source = dist.get_process_group_ranks(group)[-1]
        dist.broadcast_object_list(objects, src=source, group=group, device=device.device())
    return objects[0]


def objects_of_stages(value: Any) -> list[Any]:
    """Return the `value` (any picklable object) of every pipeline stage, in their order.

    Two all-gathers over the pipeline-parallel group, of the sizes and of the bytes; none if there is one stage.
    """
    group = parallel_state.get_pipeline_model_parallel_group()
    values = [value] * group.size()
    if group.size() > 1:
        dist.all_gather_object(values, value, group=group)
    return values


def receive_from_previous_stage(buffer: Tensor) -> None:
    """Fill `buffer` with the tensor that the previous pipeline stage sends. One point-to-point message."""
    source = parallel_state.get_pipeline_model_parallel_prev_rank()
    dist.recv(buffer, src=source, group=parallel_state.get_pipeline_model_parallel_group())


def send_to_next_stage(values: Tensor) -> None:
    """Send a tensor to the next pipeline stage, which must know its shape and dtype. One point-to-point message."""
    target = parallel_state.get_pipeline_model_parallel_next_rank()
    dist.send(values.contiguous(), dst=target, group=parallel_state.get_pipeline_model_parallel_group())


def all_gather_over_tensor_ranks(values: Tensor) -> list[Tensor]:
    """Return the tensors of all tensor-parallel ranks, by rank. All must have the same shape. One all-gather."""
    group = parallel_state.get_tensor_model_parallel_group()
    gathered = [torch.empty_like(values) for _ in range(group.size())]
    dist.all_gather(gathered, values, group=group)
    return gathered


class _AllGatherTokens(torch.autograd.Function):
    """See `all_gather_tokens`."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, index: Tensor, count: int) -> Tensor:
        ctx.save_for_backward(index)
        all_tokens = values.new_zeros(len(values), count)
        all_tokens[:, index] = values
        dist.all_reduce(all_tokens, group=parallel_state.get_context_parallel_group())
        return all_tokens

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (index,) = ctx.saved_tensors
        return gradients[0][:, index], None, None


def all_gather_tokens(values: Tensor, index: Tensor, count: int) -> Tensor:
    """Combine the values of context-parallel ranks, each of which has the values of some tokens; differentiable.

    Collective over the context-parallel group: one all-reduce in the forward pass. The backward pass exchanges nothing,
    because every rank must compute the same loss from the result, and needs only the gradient of its tokens.

    Args:
        values: [k, R], k values for each token of this rank.
        index: int64 [R], indices of these tokens among all `count` tokens.
        count: number of tokens of all ranks together.

    Returns:
        [k, count], the same on every rank.
    """
    return _AllGatherTokens.apply(values, index, count)
