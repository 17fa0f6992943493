"""The configuration: one section from each package."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_rlvr.data.config import DataConfig
from megatron_rlvr.megatron.config import ModelConfig, OptimizerConfig, ParallelConfig
from megatron_rlvr.rollout.config import EvaluationConfig, RolloutConfig
from megatron_rlvr.telemetry.config import TelemetryConfig
from megatron_rlvr.training.config import AlgorithmConfig, CheckpointConfig
from megatron_rlvr.verifiers.config import VerifierConfig


@dataclass
class Config:
    name: str = "run"
    seed: int = 0
    steps: int = 100
    run_directory: str = "???"
    threads: int = 0
    """CPU threads a process; 0 leaves torch's choice."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    verifier: VerifierConfig = field(default_factory=VerifierConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    telemetry: TelemetryConfig = field(default_factory=TelemetryConfig)
