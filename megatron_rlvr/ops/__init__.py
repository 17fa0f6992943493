"""Operators of RLVR on vocabulary-sharded logits, for any trainer: this imports torch and nothing else of ours."""

from .backend import backend
from .objective import ClippedObjective, clipped_objective
from .statistics import TokenStatistics, token_statistics

__all__ = ["ClippedObjective", "TokenStatistics", "backend", "clipped_objective", "token_statistics"]
