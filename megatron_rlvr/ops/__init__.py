"""Operators for policy gradients on vocabulary-sharded logits, for any trainer. Imports torch alone."""

from .compiled import backend
from .fused_linear import fused_linear_statistics, fused_linear_token_statistics
from .fused_objective import FusedObjective, fused_linear_objective
from .kept import KeptSets
from .objective import ClippedObjective, bounded_objective, clipped_objective
from .statistics import NonFiniteLogitsError, TokenStatistics, token_statistics
from .thresholds import Thresholds

__all__ = [
    "ClippedObjective",
    "FusedObjective",
    "KeptSets",
    "NonFiniteLogitsError",
    "Thresholds",
    "TokenStatistics",
    "backend",
    "bounded_objective",
    "clipped_objective",
    "fused_linear_objective",
    "fused_linear_statistics",
    "fused_linear_token_statistics",
    "token_statistics",
]


def __dir__() -> list[str]:
    return sorted(__all__)  # without the submodules
