"""The rollout engine that a configuration names."""

from __future__ import annotations

from contextlib import ExitStack

from megatron_rlvr.backend.policy import Policy
from megatron_rlvr.config import Config
from megatron_rlvr.rollout.engine import RolloutEngine
from megatron_rlvr.rollout.local import LocalEngine


def build_engine(config: Config, policy: Policy, resources: ExitStack) -> RolloutEngine:
    """The engine of `config.rollout.engine`; what it starts, `resources` stops. Collective over the job.

    ``recorded`` replays training rollouts and evaluates with the local engine.
    """
    if config.rollout.engine == "sglang":
        from megatron_rlvr.rollout.sglang.engine import SGLangEngine

        return SGLangEngine(config, policy, resources)
    return LocalEngine(policy.model, config.rollout.local_batch)
