"""Build the rollout engine of a configuration."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from megatron_rlvr.config import Config
from megatron_rlvr.rollout.engines.base import RolloutEngine
from megatron_rlvr.rollout.engines.local import LocalEngine
from megatron_rlvr.rollout.engines.replay import ReplayEngine
from megatron_rlvr.rollout.engines.rounded_weights import RoundedWeights
from megatron_rlvr.rollout.requirements import check_engine
from megatron_rlvr.training.policy import Policy


def build_engine(config: Config, policy: Policy, resources: ExitStack) -> RolloutEngine:
    """Build the engine that ``rollout.engine`` names. Collective over the job.

    Args:
        config: configuration with every ``auto`` resolved.
        policy: the model that generates completions, or whose weights servers receive.
        resources: stops the servers that the engine starts, when the caller closes it.

    Raises:
        UserError: if the engine cannot run with this model or layout.
    """
    check_engine(config)
    rollout = config.rollout
    if rollout.engine == "sglang":
        # Imported here because the other engines do not need httpx.
        from megatron_rlvr.rollout.engines.sglang.engine import SGLangEngine

        return SGLangEngine(rollout, Path(config.run_directory) / "sglang", policy, resources)
    if rollout.engine == "recorded":
        evaluation = None
        if config.data.heldout:
            invariant = config.model.batch_invariant
            evaluation = LocalEngine(policy.model_chunks, rollout.local_batch, invariant=invariant)
        return ReplayEngine(Path(rollout.recording or ""), evaluation)
    rounded = RoundedWeights(policy.bridge, policy.model_chunks) if rollout.quantization == "fp8" else None
    return LocalEngine(policy.model_chunks, rollout.local_batch, rounded, config.model.batch_invariant)
