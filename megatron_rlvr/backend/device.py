"""The one place that knows whether this process computes on a GPU or on the CPU.

megatron-core names CUDA in a few hundred places. Where there is no GPU, `install()` reads those names as the CPU: a
torch function mode maps ``device="cuda"`` to ``cpu``, and the two `torch.cuda` calls that megatron-core makes while
building a model answer for the CPU, and its fusions run uncompiled. Everything else of megatron-core runs unchanged,
with gloo for the collectives.
"""

from __future__ import annotations

import ctypes
import gc
import os
import sys
import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
_installed: TorchFunctionMode | None = None


class _CudaIsCpu(TorchFunctionMode):
    """Reads ``device="cuda"`` as ``cpu`` and makes `Tensor.cuda()` the identity."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if kwargs:
            device = kwargs.get("device")
            if device is not None and str(device).startswith("cuda"):
                kwargs = {**kwargs, "device": _CPU}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # megatron-core's optimizers compare this string with "torch.cuda.FloatTensor" and its bf16 sibling.
            return func(*args).replace("torch.", "torch.cuda.")
        return func(*args, **(kwargs or {}))


class _NoStream:
    """Stands for every stream of a process whose work is done when a call returns."""

    def wait_stream(self, _other: object) -> None:
        pass

    def record_event(self) -> _NoStream:
        return self

    def synchronize(self) -> None:
        pass

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _NoStream)

    __hash__ = None  # type: ignore[assignment]


_THE_STREAM = _NoStream()


def install() -> None:
    """Load megatron-core into this process: bound to the GPU of the local rank, or with CUDA read as the CPU.

    Raises:
        RuntimeError: when megatron.core was imported first (its defaults would name a GPU that is not there).
    """
    global _installed
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        _load_megatron()
        return
    if _installed is not None:
        return
    if "megatron.core" in sys.modules:
        raise RuntimeError(
            "megatron.core was imported before megatron_rlvr.backend.device.install(): call install() first"
        )
    _keep_freed_memory()
    # Of a GPU's extras, which megatron-core misses aloud in four places, and of its own default settings.
    for line in ("Transformer Engine and Apex are not installed", "full scope is deprecated"):
        warnings.filterwarnings("ignore", message=line)
    torch.cuda.current_device = lambda: _CPU  # type: ignore[assignment,return-value]
    torch.cuda.synchronize = lambda *_args, **_kwargs: None
    # The dispatcher of experts' tokens copies its counts on a stream of its own.
    torch.cuda.Stream = _NoStream  # type: ignore[misc,assignment]
    torch.cuda.current_stream = lambda *_args: _THE_STREAM  # type: ignore[assignment]
    torch.cuda.stream = lambda *_args: nullcontext()  # type: ignore[assignment]
    _installed = _CudaIsCpu()
    _installed.__enter__()
    # megatron-core takes torch.compile for its fusions as it loads. They are not for the CPU, and the compiler's own
    # modules would be a fifth of a program's start.
    compiler = torch.compile
    torch.compile = _as_it_is  # type: ignore[assignment]
    try:
        _load_megatron()
    finally:
        torch.compile = compiler


def _as_it_is(function: Any = None, **_options: Any) -> Any:
    """Stands for torch.compile, as a function and as a decorator."""
    return _as_it_is if function is None else function


def _load_megatron() -> None:
    """Import megatron-core without the garbage collector, which finds none and takes a sixth of a program's start."""
    if "megatron.core" in sys.modules:
        return
    collecting = gc.isenabled()
    gc.disable()
    try:
        import megatron.core  # noqa: F401
    finally:
        gc.freeze()  # nor will later collections find any in what stays loaded
        if collecting:
            gc.enable()


def _keep_freed_memory() -> None:
    """Have glibc keep what tensors free instead of handing it back to the kernel.

    A tensor of some hundred KB is otherwise mapped and unmapped for every operation, and half the time of a small
    model's step goes into page faults. Does nothing under another C library, or where the user tuned malloc by hand.
    """
    if any(name.startswith("MALLOC_") for name in os.environ) or sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # the most that glibc takes; larger tensors are mapped as ever
        mallopt(_M_TRIM_THRESHOLD, -1)


def finish() -> None:
    """Tell megatron-core, once it is imported, what no function mode can: on a GPU nothing.

    Recomputation saves and restores the state of CUDA's random numbers, of which there are none; and the dispatcher of
    experts' tokens makes arrays of its counts only on their way from a GPU, but hands them on as if they came from one.
    """
    if _installed is None:
        return
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer.moe import token_dispatcher

    random._get_cuda_rng_state = lambda *_args, **_kwargs: None
    random._set_cuda_rng_state = lambda *_args, **_kwargs: None

    def as_on_a_gpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    token_dispatcher.maybe_move_tensor_to_cpu = as_on_a_gpu


def without_shim() -> AbstractContextManager:
    """Run hot code, which names no device, without the function mode: it costs microseconds for every torch call."""
    return nullcontext() if _installed is None else torch._C.DisableTorchFunction()


def on_gpu() -> bool:
    """Whether tensors of this process live on a GPU."""
    return torch.cuda.is_available()


def device() -> torch.device:
    """The device of this process's model and batches."""
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu() else _CPU


def collective_backend() -> str:
    """The name of the torch.distributed backend: ``nccl`` on a GPU, ``gloo`` on the CPU."""
    return "nccl" if on_gpu() else "gloo"
