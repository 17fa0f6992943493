"""The section ``telemetry`` of the configuration."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class TelemetryConfig:
    """Where metrics are written besides ``metrics.jsonl``, and whether plots are drawn."""

    tensorboard: bool = True
    """Write TensorBoard event files to ``tensorboard/`` of the run directory."""
    wandb_project: str | None = None
    """Weights & Biases project to log to as well. Null turns W&B off."""
    plots: bool = True
    """Draw ``plots/`` at the end of the run."""
