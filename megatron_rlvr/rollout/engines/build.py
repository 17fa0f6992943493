"""The rollout engine that a configuration names."""

from __future__ import annotations

from contextlib import ExitStack

from megatron_rlvr.config import Config
from megatron_rlvr.errors import UserError
from megatron_rlvr.rollout.engines.base import RolloutEngine
from megatron_rlvr.rollout.engines.local import LocalEngine
from megatron_rlvr.training.policy import Policy


def build_engine(config: Config, policy: Policy, resources: ExitStack) -> RolloutEngine:
    """The engine of `config.rollout.engine`; what it starts, `resources` stops. Collective over the job.

    ``recorded`` replays training rollouts and evaluates with the local engine.
    """
    if config.rollout.engine == "sglang":
        from megatron_rlvr.rollout.engines.sglang.engine import SGLangEngine

        return SGLangEngine(config, policy, resources)
    if config.parallel.expert > 1 and config.rollout.engine == "local":
        raise UserError(
            f"rollout.engine=local does not generate under parallel.expert={config.parallel.expert}, whose ranks would "
            "have to end together: set rollout.engine=sglang, or parallel.expert=1"
        )
    if config.parallel.expert > 1 and config.data.heldout:
        raise UserError(
            f"rollout.engine={config.rollout.engine} evaluates with the local engine, which does not generate under "
            f"parallel.expert={config.parallel.expert}: set data.heldout=null, or rollout.engine=sglang"
        )
    return LocalEngine(policy.model_chunks, config.rollout.local_batch)
