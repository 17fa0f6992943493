"""What a run tells about itself: metrics, progress, the summary at the end, plots."""

from megatron_rlvr.telemetry.metrics import MetricsWriter, deterministic, read_metrics

__all__ = ["MetricsWriter", "deterministic", "read_metrics"]
