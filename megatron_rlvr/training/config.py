"""The `algorithm` and `checkpoint` sections of the configuration."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class AlgorithmConfig:
    advantage: str = "grpo"
    """``grpo``, ``grpo-no-std`` (Dr. GRPO) or ``rloo``."""
    aggregation: str = "token-mean"
    """``token-mean`` (DAPO), ``sequence-mean`` (GRPO) or ``constant`` (Dr. GRPO)."""
    objective: dict[str, Any] = field(default_factory=lambda: {"name": "clip"})
    """The token objective, by name, with its parameters."""
    schedule: dict[str, Any] = field(default_factory=lambda: {"name": "constant"})
    """The schedule of clip thresholds, by name, with its parameters."""
    minibatches: int = 8
    """Optimizer steps that one pass over a rollout is split into."""
    epochs: int = 1
    """Passes over each rollout."""
    fused_linear: bool = False
    """Form logits a chunk at a time inside the loss instead of whole (the operators' fused head)."""
    drop_zero_advantage: bool = True
    """Leave sequences out of the update when their whole group earned the same reward: their gradient is zero."""


@dataclass
class CheckpointConfig:
    every: int = 50
    """Steps between checkpoints; the last step is always saved. 0 saves at the end only."""
    keep: int = 2
    """Newest checkpoints that stay on disk."""
    keep_hours: float = 0.0
    """Of older ones, one for every so many hours stays, too; 0 keeps none."""
    keep_best: str | None = None
    """The checkpoint with the largest value of this metric stays, too: ``reward``, ``evaluation/pass@1`` ..."""
    asynchronous: bool = False
    """Go on training while a checkpoint is written, from a copy in the host's memory."""
    export_huggingface: bool = True
    """Write the final policy as a Hugging Face folder ``huggingface/``."""
