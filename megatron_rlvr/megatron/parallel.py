"""Process groups: start-up and shutdown, and the position of a process in them."""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from megatron_rlvr.errors import UserError
from megatron_rlvr.megatron import cpu_shim, device
from megatron_rlvr.megatron.config import ParallelConfig
from megatron_rlvr.megatron.layout_checks import check_world_size
from megatron_rlvr.megatron.waiting import waiting_groups


@dataclass(frozen=True)
class Layout:
    """The position of this process in the parallel groups.

    Attributes:
        rank, world_size: rank of the process in the job, and number of processes.
        data_rank, data_size: data-parallel rank and size. Each data-parallel rank draws its own prompts.
        is_leader: whether this process draws the prompts of its data-parallel rank and verifies the completions
            (tensor, pipeline and context rank 0).
        is_reporting_rank: whether this process reports for the last pipeline stage of its data-parallel rank (tensor
            and context rank 0 of that stage). The tensor- and context-parallel ranks of a stage all compute the same
            sums, so one of them must report.
    """

    rank: int
    world_size: int
    data_rank: int
    data_size: int
    is_leader: bool
    is_reporting_rank: bool

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files of the run."""
        return self.rank == 0


@contextmanager
def parallel_groups(config: ParallelConfig, seed: int) -> Iterator[Layout]:
    """Create torch.distributed's and megatron-core's process groups; yield the layout; destroy them at the end.

    Raises:
        UserError: if the parallel sizes do not divide the number of processes.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    _check_layout_of_job(config, world_size)
    if "RANK" not in os.environ:  # started without torchrun: a job of one process, which needs no port
        dist.init_process_group(device.collective_backend(), store=dist.HashStore(), rank=0, world_size=1)
    else:
        timeout = datetime.timedelta(minutes=config.timeout_minutes)
        dist.init_process_group(device.collective_backend(), timeout=timeout)
    cpu_shim.patch_megatron_core()
    try:
        # To save a checkpoint, the distributed optimizer gathers its state over gloo, in host memory.
        initialize_model_parallel(config, create_gloo_groups=config.distributed_optimizer)
        # The inference tracker's fork() and add() do nothing, so no CUDA generator is touched. RLVR has no dropout.
        model_parallel_cuda_manual_seed(seed, inference_rng_tracker=True)
        torch.manual_seed(seed)
        layout = _layout()
        with waiting_groups(layout.data_rank, layout.is_leader, config.wait_timeout_minutes):
            yield layout
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def _check_layout_of_job(config: ParallelConfig, world_size: int) -> None:
    check_world_size(config, world_size, "processes", "start a multiple of {} (torchrun --nproc-per-node)")
    if config.expert > 1 and config.expert_tensor > 1 and not device.on_gpu():
        raise UserError(
            f"parallel.expert={config.expert} with parallel.expert_tensor={config.expert_tensor} needs NCCL, because "
            "gloo cannot gather tensors of different sizes: set parallel.expert_tensor=1"
        )


def initialize_model_parallel(config: ParallelConfig, *, create_gloo_groups: bool) -> None:
    """Create megatron-core's process groups within the default process group. Collective over the job."""
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.tensor,
        pipeline_model_parallel_size=config.pipeline,
        virtual_pipeline_model_parallel_size=config.virtual_pipeline if config.virtual_pipeline > 1 else None,
        context_parallel_size=config.context,
        expert_model_parallel_size=config.expert,
        expert_tensor_parallel_size=config.expert_tensor,
        create_gloo_process_groups=create_gloo_groups,
    )


def _layout() -> Layout:
    first_of_context = parallel_state.get_context_parallel_rank() == 0
    return Layout(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        data_rank=parallel_state.get_data_parallel_rank(),
        data_size=parallel_state.get_data_parallel_world_size(),
        is_leader=parallel_state.get_model_parallel_group().rank() == 0 and first_of_context,
        is_reporting_rank=parallel_state.is_pipeline_last_stage()
        and parallel_state.get_tensor_model_parallel_rank() == 0
        and first_of_context,
    )


def tensor_group() -> dist.ProcessGroup | None:
    """Return the tensor-parallel group; None if it has one member, so that operators skip the exchange."""
    group = parallel_state.get_tensor_model_parallel_group()
    return group if group.size() > 1 else None


def context_rank() -> int:
    """Return the context-parallel rank of this process."""
    return parallel_state.get_context_parallel_rank()
