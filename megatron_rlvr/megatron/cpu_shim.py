"""Runs megatron-core on a machine without a GPU.

megatron-core uses CUDA by name in a few hundred places. On a machine without a GPU, this module redirects them to the
CPU: a torch function mode maps ``device="cuda"`` to ``cpu``, the `torch.cuda` functions that megatron-core calls are
replaced, and its fusions run uncompiled. Everything else in megatron-core runs unchanged, with gloo for collectives.

Importing `megatron_rlvr.megatron` calls `install_before_megatron_core`, so callers need no particular import order.
"""

from __future__ import annotations

import ctypes
import gc
import importlib.util
import os
import sys
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_MEGATRON_CORE = "megatron.core"
_CPU = torch.device("cpu")
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # from malloc.h
_installed: TorchFunctionMode | None = None


def install_before_megatron_core() -> None:
    """Prepare this process when megatron-core is first imported, or at once if it already is.

    CUDA is not initialised before that import, so a program may read a configuration and fork.
    """
    if _MEGATRON_CORE in sys.modules:
        _prepare_process()
    elif not any(isinstance(finder, _MegatronCoreFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _MegatronCoreFinder())


class _MegatronCoreFinder(MetaPathFinder):
    """Prepares the process when megatron-core is first imported, and then removes itself."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _MEGATRON_CORE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            _prepare_process()
            spec.loader = _QuickLoader(spec.loader)
        return spec


class _QuickLoader(Loader):
    """Loads megatron-core without the garbage collector and, on the CPU, without torch.compile.

    The collector would find no garbage and take a sixth of a program's start-up time. megatron-core calls torch.compile
    for its fusions while it loads, which imports the compiler; on the CPU that would take a fifth of the start-up time.
    """

    def __init__(self, loader: Loader):
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        collecting, compiler = gc.isenabled(), torch.compile
        gc.disable()
        if _installed is not None:
            torch.compile = _no_compile  # type: ignore[assignment]
        try:
            self.loader.exec_module(module)
        finally:
            torch.compile = compiler
            gc.freeze()  # later collections skip the loaded modules
            if collecting:
                gc.enable()


def _prepare_process() -> None:
    """Select the GPU of the local rank; without a GPU, install the shim."""
    global _installed
    # Apex is optional, on a GPU too. These warnings would precede the error of a command that fails.
    warnings.filterwarnings("ignore", message="Apex is not installed")
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        return
    if _installed is not None:
        return
    _keep_freed_memory()
    # Where the GPU recipe is installed, megatron-core would import these, and they fail without the driver's libcuda.
    for name in ("transformer_engine", "flash_mla"):
        if name not in sys.modules and importlib.util.find_spec(name) is not None:
            sys.modules[name] = None  # type: ignore[assignment]
    # megatron-core warns that GPU-only packages and variables are missing, and warns about its own default settings.
    for line in (
        "Transformer Engine and Apex are not installed",
        "When using async grad allreduce",
        "full scope is deprecated",
    ):
        warnings.filterwarnings("ignore", message=line)
    torch.cuda.current_device = lambda: _CPU  # type: ignore[assignment,return-value]
    torch.cuda.synchronize = lambda *_args, **_kwargs: None
    # The token dispatcher of a mixture of experts copies its counts on a separate stream.
    torch.cuda.Stream = _NoStream  # type: ignore[misc,assignment]
    torch.cuda.current_stream = lambda *_args: _THE_STREAM  # type: ignore[assignment]
    torch.cuda.stream = lambda *_args: nullcontext()  # type: ignore[assignment]
    _installed = _CudaIsCpu()
    _installed.__enter__()


class _CudaIsCpu(TorchFunctionMode):
    """Maps ``device="cuda"`` to ``cpu`` and makes `Tensor.cuda()` the identity."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if kwargs:
            device = kwargs.get("device")
            if device is not None and str(device).startswith("cuda"):
                kwargs = {**kwargs, "device": _CPU}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # megatron-core's optimizers compare this string with "torch.cuda.FloatTensor" and its bf16 counterpart.
            return func(*args).replace("torch.", "torch.cuda.")
        return func(*args, **(kwargs or {}))


class _NoStream:
    """Replaces every CUDA stream. On the CPU, work is complete when a call returns."""

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


def _no_compile(function: Any = None, **_options: Any) -> Any:
    """Replaces torch.compile, as a function and as a decorator."""
    return _no_compile if function is None else function


def _keep_freed_memory() -> None:
    """Make glibc keep the memory that tensors free instead of returning it to the kernel.

    Otherwise a tensor of a few hundred KB is mapped and unmapped for every operation, and page faults take half the
    time of a small model's step. This does nothing with another C library, or if the user has configured malloc.
    """
    if any(name.startswith("MALLOC_") for name in os.environ) or sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # glibc's maximum; larger tensors are still mapped
        mallopt(_M_TRIM_THRESHOLD, -1)


def patch_megatron_core() -> None:
    """Patch functions of megatron-core that a function mode cannot redirect. Does nothing on a GPU.

    Call this after megatron-core is imported. Recomputation saves and restores the state of CUDA's random number
    generator, which does not exist here. The token dispatcher of a mixture of experts converts its counts to numpy
    arrays only when it copies them from a GPU, but always uses them as arrays.
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
    """Return a context without the function mode, which costs microseconds per torch call.

    Code in this context must not name a CUDA device.
    """
    return nullcontext() if _installed is None else torch._C.DisableTorchFunction()
