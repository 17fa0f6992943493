"""The device on which this process computes: a GPU or the CPU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def on_gpu() -> bool:
    """Whether this process computes on a GPU."""
    return torch.cuda.is_available()


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
