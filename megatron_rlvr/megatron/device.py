"""The device on which this process computes: a GPU or the CPU."""

from __future__ import annotations

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


def return_cached_memory() -> None:
    """Return the memory that torch's allocator caches to the driver, so that other processes on the GPU can use it."""
    if on_gpu():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def collective_backend() -> str:
    """Return the name of the torch.distributed backend: ``nccl`` on a GPU, ``gloo`` on the CPU."""
    return "nccl" if on_gpu() else "gloo"
