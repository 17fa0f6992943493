"""What a run reports: metrics files, the progress display, ``status.json``, the final summary and plots."""

from megatron_rlvr.telemetry.metrics import MetricsWriter, deterministic, read_metrics

__all__ = ["MetricsWriter", "deterministic", "read_metrics"]
