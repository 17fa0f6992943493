"""The device on which this process computes: a GPU or the CPU."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from megatron_rlvr import ops
from megatron_rlvr.errors import UserError
from megatron_rlvr.gpu_node import why_unusable

_OLDEST_CAPABILITY = (8, 0)


def on_gpu() -> bool:
    """Whether this process computes on a GPU.

    Raises:
        UserError: if the node has GPUs that torch cannot use, and the environment does not ask for the CPU.
    """
    if torch.cuda.is_available():
        return True
    if reason := _why_unusable():
        raise UserError(reason)
    return False


@functools.cache
def _why_unusable() -> str | None:
    return why_unusable()


def check_operators() -> None:
    """Refuse to train on a GPU that the CUDA kernels of `megatron_rlvr.ops` do not serve.

    The eager reference would run instead: it is slower and needs memory that the plan does not count.
    ``MEGATRON_RLVR_OPS=reference`` in the environment allows it.

    Raises:
        UserError: if the kernels were not built, or the GPU is older than the oldest that they are built for.
    """
    if not on_gpu() or os.environ.get("MEGATRON_RLVR_OPS") == "reference":
        return
    allow = "or set MEGATRON_RLVR_OPS=reference to train with the slower eager operators"
    if ops.backend() != "cuda":
        raise UserError(
            "this node has GPUs, but megatron_rlvr.ops was built without CUDA kernels: run `make setup-gpu`, or "
            f"`MEGATRON_RLVR_CUDA=1 pip install --no-build-isolation --no-deps -e .` where nvcc is installed, {allow}"
        )
    capability = torch.cuda.get_device_capability()
    if capability < _OLDEST_CAPABILITY:
        raise UserError(
            f"{torch.cuda.get_device_name()} has compute capability {capability[0]}.{capability[1]}, and the CUDA "
            f"kernels need 8.0 (A100) or newer: use newer GPUs, {allow}"
        )


def device() -> torch.device:
    """Return the device of the model and the batches of this process."""
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu() else torch.device("cpu")


def to_device(values: Tensor, target: torch.device) -> Tensor:
    """Move a tensor of the host to `target`, a GPU or the CPU, without waiting for the GPU.

    Callers select what a microbatch needs while it is on the host, so that a microbatch and not the rollout is moved.
    """
    if target.type == "cuda" and values.device.type == "cpu":
        # A copy from pageable memory would stop the host until the GPU has finished all earlier work.
        return values.pin_memory().to(target, non_blocking=True)
    return values.to(target)


def synchronize() -> None:
    """Wait until a GPU has done what it was given."""
    if on_gpu():
        torch.cuda.synchronize()


@contextmanager
def without_expandable_segments() -> Iterator[None]:
    """Allocate memory of a GPU meanwhile that another process may map through CUDA IPC.

    Memory in expandable segments consists of many handles, which the other process must duplicate with
    ``pidfd_getfd``; containers and other users are not allowed to. Blocks that are cached in such segments are not
    reused while they are off.
    """
    settings = ",".join(os.environ.get(name, "") for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"))
    if not on_gpu() or "expandable_segments:True" not in settings.replace(" ", ""):
        yield
        return
    torch._C._accelerator_setAllocatorSettings("expandable_segments:False")
    try:
        yield
    finally:
        torch._C._accelerator_setAllocatorSettings("expandable_segments:True")


def return_cached_memory() -> None:
    """Return the memory that torch's allocator caches to the driver, so that other processes on the GPU can use it."""
    if on_gpu():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def collective_backend() -> str:
    """Return the name of the torch.distributed backend: ``nccl`` on a GPU, ``gloo`` on the CPU."""
    return "nccl" if on_gpu() else "gloo"
