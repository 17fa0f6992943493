"""The section ``verifier`` of the configuration."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

from megatron_rlvr.config_schema import Bounds, Seconds

DEFAULT_WORKERS = 4
NEED_NO_WORKERS = ("countdown", "exact")
"""Verifiers that take microseconds for every completion, so that they need no worker process to enforce limits."""


@dataclass
class VerifierConfig:
    """What computes the reward of a completion."""

    name: str = "auto"
    """``math``, ``exact``, ``countdown``, ``reasoning_gym``, or ``module:function`` for a Python function. ``auto`` is
    ``reasoning_gym`` if the data has tasks of that package, else ``math``. The function returns a number
    that is finite as a float32, or a dictionary whose ``score`` is one. If it fails for every completion of the first
    step, the run stops."""
    workers: Annotated[int, Bounds(at_least=0, cap=1024)] | None = None
    """Worker processes per data-parallel rank; 0 verifies in the training process, for verifiers that cannot hang.
    null means 0 for ``countdown`` and ``exact``, and 4 for the others."""
    timeout_seconds: Seconds = 10.0
    """Longest time for one completion in a worker, without the time that the worker waits for a processor. A completion
    that takes longer has reward 0 and is counted."""
    memory_mb: Annotated[int, Bounds(at_least=64, cap=2**24)] = 2048
    """MiB of data memory per worker."""
    options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the verifier."""
