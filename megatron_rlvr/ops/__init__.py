"""Operators of RLVR on vocabulary-sharded logits, for any trainer: this imports torch and nothing else of ours."""

from .compiled import backend
from .fused_linear import (
    FusedObjective,
    fused_linear_objective,
    fused_linear_statistics,
    fused_linear_token_statistics,
)
from .objective import ClippedObjective, bounded_objective, clipped_objective
from .statistics import TokenStatistics, token_statistics

__all__ = [
    "ClippedObjective",
    "FusedObjective",
    "TokenStatistics",
    "backend",
    "bounded_objective",
    "clipped_objective",
    "fused_linear_objective",
    "fused_linear_statistics",
    "fused_linear_token_statistics",
    "token_statistics",
]
