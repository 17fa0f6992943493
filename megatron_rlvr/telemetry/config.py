"""The section ``telemetry`` of the configuration."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_rlvr.config_schema import NonNegativeInt


@dataclass
class TelemetryConfig:
    """Where metrics are written besides ``metrics.jsonl``, and whether plots are drawn."""

    tensorboard: bool = True
    """Write TensorBoard event files to ``tensorboard/`` of the run directory."""
    wandb_project: str | None = None
    """Weights & Biases project to log to as well. Null turns W&B off."""
    mlflow_experiment: str | None = None
    """MLflow experiment to log to as well, at ``MLFLOW_TRACKING_URI``. Null turns MLflow off."""
    samples_every: NonNegativeInt = 1
    """Store the samples of every this many steps, and of every evaluation, in ``samples/`` of the run directory: one
    JSONL file per step, with prompt, answer, completion, reward, length and entropy. ``tools/show_samples.py`` shows
    them. 0 stores none."""
    mismatch_detail: NonNegativeInt = 0
    """Store this many tokens of every step, those whose log-probs differ most between engine and trainer, in
    ``mismatch/`` of the run directory: one JSONL file per step, with token, position, both log-probs, entropy, age and
    the text before. A step of which the mismatch alarm warns stores at least 20."""
    plots: bool = True
    """Draw ``plots/`` at the end of the run."""
