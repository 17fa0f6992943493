"""The rollout engine that a configuration names."""

from __future__ import annotations

from megatron_rlvr.backend.policy import Policy
from megatron_rlvr.config import RolloutConfig
from megatron_rlvr.rollout.engine import RolloutEngine
from megatron_rlvr.rollout.local import LocalEngine


def build_engine(config: RolloutConfig, policy: Policy) -> RolloutEngine:
    """The engine of `config.engine`. ``recorded`` replays training rollouts and evaluates with the local engine."""
    return LocalEngine(policy.model, config.local_batch)
