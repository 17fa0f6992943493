"""Loads the compiled kernels and says which ones run."""

from __future__ import annotations

import ctypes
import os
import warnings
from pathlib import Path

import torch

_PATH = Path(__file__).parent / "_C.so"
_REBUILD = "rebuild it with `pip install --no-build-isolation -e .`"
_INSTRUCTION_SETS = ("avx512", "avx2", "baseline")
_announced: set[str] = set()


def load_kernels() -> ctypes.CDLL | None:
    """Load the compiled kernels into torch. Return None, with one warning, if they were not built.

    ``MEGATRON_RLVR_OPS=reference`` in the environment turns them off. Raises ImportError if the library exists but does
    not load, and ValueError for an unknown value of this variable or of ``MEGATRON_RLVR_CPU``.
    """
    choice = os.environ.get("MEGATRON_RLVR_OPS", "")
    if choice == "reference":
        return None
    if choice:
        raise ValueError(f"MEGATRON_RLVR_OPS: must be 'reference' or unset, found {choice!r}")
    limit = os.environ.get("MEGATRON_RLVR_CPU", "")
    if limit not in ("", *_INSTRUCTION_SETS):  # the library reads it, too, and would ignore a value it does not know
        raise ValueError(f"MEGATRON_RLVR_CPU: must be one of {', '.join(_INSTRUCTION_SETS)} or unset, found {limit!r}")
    if not _PATH.exists():
        announce_fallback("the compiled kernels were not built")
        return None
    try:
        torch.ops.load_library(str(_PATH))
        library = ctypes.CDLL(str(_PATH))
    except OSError as error:
        raise ImportError(
            f"megatron_rlvr.ops: {_PATH} does not load ({error}); {_REBUILD}, or set MEGATRON_RLVR_OPS=reference"
        ) from error
    library.megatron_rlvr_cpu_backend.restype = ctypes.c_char_p
    return library


def announce_fallback(reason: str) -> None:
    """Warn that the eager reference runs, once per reason."""
    if reason not in _announced:
        _announced.add(reason)
        warnings.warn(
            f"megatron_rlvr.ops: {reason}; the eager reference runs, which is slower and holds several copies of the "
            f"logits; {_REBUILD} (and MEGATRON_RLVR_CUDA=1 for CUDA), or set MEGATRON_RLVR_OPS=reference",
            RuntimeWarning,
            stacklevel=3,
        )


_library = load_kernels()
# Looked up once, because code under torch.compile cannot look it up.
_serves_cuda = _library is not None and torch._C._dispatch_has_kernel_for_dispatch_key(
    "megatron_rlvr::row_statistics", "CUDA"
)


def backend() -> str:
    """The kernels that run: "cuda", "cpu-avx512", "cpu-avx2", "cpu" (no vector extension) or "reference".

    "cuda" means that CUDA kernels were built and a GPU is available; CPU tensors then still run on the CPU kernels.
    "reference" is eager torch, which runs where no kernels were built or ``MEGATRON_RLVR_OPS=reference`` is set.
    """
    if _library is None:
        return "reference"
    if torch.cuda.is_available() and _serves_cuda:
        return "cuda"
    return _library.megatron_rlvr_cpu_backend().decode()


def require_kernel(operator: str) -> None:
    """Raise ImportError if the compiled kernels are loaded and lack ``operator``: they are older than this code."""
    if _library is not None and not torch._C._dispatch_has_kernel_for_dispatch_key(operator, "CPU"):
        raise ImportError(
            f"megatron_rlvr.ops: {_PATH} lacks {operator}, so it was built from other sources than these; {_REBUILD}, "
            "or set MEGATRON_RLVR_OPS=reference"
        )


def check_device(device: torch.device) -> None:
    """Warn, once, if the eager reference serves tensors on ``device`` although kernels were built."""
    if _library is not None and device.type == "cuda" and not _serves_cuda:
        announce_fallback("the CUDA kernels were not built")
