"""The `telemetry` section of the configuration."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class TelemetryConfig:
    tensorboard: bool = True
    wandb_project: str | None = None
    """Also log to this Weights & Biases project."""
    plots: bool = True
    """Draw ``plots/`` at the end of the run."""
