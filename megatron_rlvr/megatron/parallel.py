"""Process groups: start-up, ranks and the few collectives that the training loop itself needs."""

from __future__ import annotations

import datetime
import os
import pickle
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from torch import Tensor

from megatron_rlvr.errors import UserError
from megatron_rlvr.megatron import cpu_shim, device
from megatron_rlvr.megatron.config import ParallelConfig

T = TypeVar("T")


@dataclass(frozen=True)
class Layout:
    """Where this process stands among the parallel groups.

    Attributes:
        rank, world_size: of the whole job.
        data_rank, data_size: data-parallel rank and size; each data-parallel rank owns its own prompts.
        is_leader: the process of its data-parallel rank that draws prompts and verifies (tensor, pipeline and context
            rank 0).
        is_first_stage, is_last_stage: of the pipeline.
    """

    rank: int
    world_size: int
    data_rank: int
    data_size: int
    is_leader: bool
    is_first_stage: bool
    is_last_stage: bool

    @property
    def is_main(self) -> bool:
        """Whether this process writes the run's files."""
        return self.rank == 0


@contextmanager
def parallel_groups(config: ParallelConfig, seed: int) -> Iterator[Layout]:
    """Initialise torch.distributed and megatron-core's groups, yield this process's layout, take them down at the end.

    Raises:
        UserError: when the world size is no multiple of tensor x pipeline x context.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    model_size = config.tensor * config.pipeline * config.context
    if world_size % model_size:
        raise UserError(
            f"parallel.tensor x parallel.pipeline x parallel.context = {model_size} does not divide the {world_size} "
            f"processes: start a multiple of {model_size} (torchrun --nproc-per-node) or lower one of the three"
        )
    expert_size = config.expert_tensor * config.expert * config.pipeline
    if world_size % expert_size:
        raise UserError(
            f"parallel.expert_tensor x parallel.expert x parallel.pipeline = {expert_size} does not divide the "
            f"{world_size} processes: start a multiple of {expert_size} or lower one of the three"
        )
    if config.expert > 1 and config.expert_tensor > 1 and not device.on_gpu():
        raise UserError(
            f"parallel.expert={config.expert} with parallel.expert_tensor={config.expert_tensor} needs NCCL, for gloo "
            "gathers no parts of different sizes: set parallel.expert_tensor=1"
        )
    if "RANK" not in os.environ:  # started without torchrun: a job of one process that rendezvous with itself
        os.environ.update(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1")
        os.environ["MASTER_PORT"] = "0"
        store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True)
        dist.init_process_group(device.collective_backend(), store=store, rank=0, world_size=1)
    else:
        timeout = datetime.timedelta(minutes=config.timeout_minutes)
        dist.init_process_group(device.collective_backend(), timeout=timeout)
    cpu_shim.patch_megatron_core()
    try:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=config.tensor,
            pipeline_model_parallel_size=config.pipeline,
            virtual_pipeline_model_parallel_size=config.virtual_pipeline if config.virtual_pipeline > 1 else None,
            context_parallel_size=config.context,
            expert_model_parallel_size=config.expert,
            expert_tensor_parallel_size=config.expert_tensor,
            # The distributed optimizer's state is gathered over these when it is saved: in the host's memory.
            create_gloo_process_groups=config.distributed_optimizer,
        )
        # The inference tracker's fork() and add() do nothing, so no CUDA generator is touched; dropout is off in RLVR.
        model_parallel_cuda_manual_seed(seed, inference_rng_tracker=True)
        torch.manual_seed(seed)
        yield Layout(
            rank=dist.get_rank(),
            world_size=world_size,
            data_rank=parallel_state.get_data_parallel_rank(),
            data_size=parallel_state.get_data_parallel_world_size(),
            is_leader=parallel_state.get_model_parallel_group().rank() == 0
            and parallel_state.get_context_parallel_rank() == 0,
            is_first_stage=parallel_state.is_pipeline_first_stage(),
            is_last_stage=parallel_state.is_pipeline_last_stage(),
        )
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def tensor_group() -> dist.ProcessGroup | None:
    """The tensor-parallel group, or None where it has one member (operators then skip the exchange)."""
    group = parallel_state.get_tensor_model_parallel_group()
    return group if group.size() > 1 else None


def share_with_model_peers(value: T | None) -> T:
    """Send the leader's `value` (any picklable object) to the processes that work on the same sequences with it.

    A broadcast over the leader's context-parallel group, then one over the model-parallel group of each of its ranks.
    """
    for group in (parallel_state.get_context_parallel_group(), parallel_state.get_model_parallel_group()):
        if group.size() > 1:
            box = [value]
            source = dist.get_process_group_ranks(group)[0]
            dist.broadcast_object_list(box, src=source, group=group, device=device.device())
            value = box[0]
    return value  # type: ignore[return-value]


def data_rank() -> int:
    """This process's data-parallel rank."""
    return parallel_state.get_data_parallel_rank()


def gather_over_leaders(values: Sequence[float]) -> list[list[float]]:
    """The values of every data-parallel rank's leader, as many of each, by rank. Collective over leaders."""
    group = parallel_state.get_data_parallel_group()  # of a leader: that of all leaders
    own = torch.tensor(values, dtype=torch.float64, device=device.device())
    found = [torch.empty_like(own) for _ in range(group.size())]
    dist.all_gather(found, own, group=group)
    return [row.tolist() for row in found]


def exchange_over_leaders(parcels: Sequence[T]) -> list[T]:
    """Give parcel r (any picklable object) to the leader of data-parallel rank r; what the leaders gave to this one.

    Two all-to-alls, of sizes and of bytes. Collective over leaders.
    """
    group, here = parallel_state.get_data_parallel_group(), device.device()
    packed = [pickle.dumps(parcel) for parcel in parcels]
    given = torch.tensor([len(text) for text in packed], device=here)
    taken = torch.empty_like(given)
    dist.all_to_all_single(taken, given, group=group)
    sizes = taken.tolist()
    sent = torch.frombuffer(bytearray(b"".join(packed)), dtype=torch.uint8).to(here)
    received = torch.empty(sum(sizes), dtype=torch.uint8, device=here)
    dist.all_to_all_single(received, sent, sizes, given.tolist(), group=group)
    return [pickle.loads(part.numpy().tobytes()) for part in received.cpu().split(sizes)]


class _ShareTokens(torch.autograd.Function):
    """Rows of values that context-parallel ranks know of different tokens become rows of all tokens on every rank.

    Every rank then computes the same loss of all tokens, so the gradient of its own ones is all it needs: nothing is
    exchanged backward. One all-reduce forward.
    """

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, here: torch.Tensor, count: int) -> torch.Tensor:
        ctx.save_for_backward(here)
        whole = values.new_zeros(len(values), count)
        whole[:, here] = values
        dist.all_reduce(whole, group=parallel_state.get_context_parallel_group())
        return whole

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (here,) = ctx.saved_tensors
        return gradients[0][:, here], None, None


def share_tokens(values: torch.Tensor, here: torch.Tensor, count: int) -> torch.Tensor:
    """Values [k, R] of this rank's tokens `here` (int64 [R]) to those of all tokens, [k, count]; differentiable.

    Collective over the context-parallel group, whose ranks must compute the same loss from the result.
    """
    return _ShareTokens.apply(values, here, count)


def share_with_job(value: T | None) -> T:
    """Send rank 0's `value` (any picklable object) to every process."""
    box = [value]
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(box, src=0, device=device.device())
    return box[0]  # type: ignore[return-value]


def sum_over_job(sums: Mapping[str, float], contributes: bool) -> dict[str, float]:
    """Add `sums` of every contributing process; all processes get the result. One all-reduce of len(sums) float64.

    A data-parallel rank must contribute once: pass ``contributes=layout.is_leader`` for what the leader knows and
    ``contributes=`` "last stage, tensor rank 0" for what the last pipeline stage knows.
    """
    names = sorted(sums)
    values = torch.tensor([sums[n] if contributes else 0.0 for n in names], dtype=torch.float64, device=device.device())
    dist.all_reduce(values)
    return dict(zip(names, values.tolist(), strict=True))


def sum_tensor_over_job(values: Tensor, contributes: bool) -> Tensor:
    """`sum_over_job` of a float64 tensor, of the same shape on every process. One all-reduce."""
    total = (values if contributes else torch.zeros_like(values)).to(device.device())
    dist.all_reduce(total)
    return total.cpu()


def max_over_job(maxima: Mapping[str, float]) -> dict[str, float]:
    """The largest of every process's value, for each name. One all-reduce of len(maxima) float64."""
    names = sorted(maxima)
    values = torch.tensor([maxima[n] for n in names], dtype=torch.float64, device=device.device())
    dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return dict(zip(names, values.tolist(), strict=True))


def any_rank(flag: bool) -> bool:
    """Whether `flag` is true on any process; every process gets the same answer."""
    return max_over_job({"flag": float(flag)})["flag"] > 0


def barrier() -> None:
    """Wait until every process of the job is here."""
    any_rank(False)
