"""The section ``telemetry`` of the configuration."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class TelemetryConfig:
    """Where metrics are written besides ``metrics.jsonl``, and plots."""

    tensorboard: bool = True
    """Write TensorBoard event files to ``tensorboard/`` of the run directory."""
    wandb_project: str | None = None
    """Weights & Biases project to log to as well; null logs to none."""
    plots: bool = True
    """Draw ``plots/`` at the end of the run."""
