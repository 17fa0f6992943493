"""The `verifier` section of the configuration."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class VerifierConfig:
    name: str = "math"
    """``math``, ``exact``, ``countdown`` or ``module:function``."""
    workers: int | None = None
    """Worker processes of each data-parallel rank; 0 verifies in the training process, for verifiers that cannot hang.
    By default 0 for ``countdown`` and ``exact``, which cannot, and 4 for the others."""
    timeout_seconds: float = 10.0
    """Time for one completion in a worker; a longer one is worth 0 and is counted."""
    memory_mb: int = 2048
    """Memory of one worker."""
    options: dict[str, Any] = field(default_factory=dict)
    """Passed to the verifier by name."""
