"""The parts that every program running the policy is built from: training, evaluation and measurements."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from megatron_rlvr.config import Config
from megatron_rlvr.megatron.parallel import Layout
from megatron_rlvr.rollout.collection import RolloutCollector
from megatron_rlvr.rollout.engines.base import RolloutEngine
from megatron_rlvr.rollout.engines.build import build_engine
from megatron_rlvr.rollout.evaluation import Evaluator
from megatron_rlvr.rollout.tokenization import Tokenization
from megatron_rlvr.training.checkpoint import Checkpoints
from megatron_rlvr.training.policy import Policy
from megatron_rlvr.verifiers import VerifierPool, build_pool


@dataclass(frozen=True)
class Components:
    """A policy, the engine that generates with it, and what reads and judges its completions.

    Attributes:
        config: of the run, with every ``auto`` resolved.
        layout: where this process stands.
        policy: with the weights of ``model.path`` until a checkpoint is loaded.
        engine: generates with the weights of the policy, once `RolloutEngine.update_weights` has announced them.
        tokenization, verifiers: of the run.
        checkpoints: of the run directory.
    """

    config: Config
    layout: Layout
    policy: Policy
    engine: RolloutEngine
    tokenization: Tokenization
    verifiers: VerifierPool
    checkpoints: Checkpoints

    def collector(self) -> RolloutCollector:
        """Rollouts of the training data, which is read and checked here."""
        return RolloutCollector(self.config, self.layout, self.engine, self.tokenization, self.verifiers)

    def evaluator(self) -> Evaluator | None:
        """Evaluation on the held-out data, which is read and checked here; None without ``data.heldout``."""
        if self.config.data.heldout is None:
            return None
        return Evaluator(self.config, self.layout, self.engine, self.tokenization, self.verifiers)


def build_components(config: Config, layout: Layout, resources: ExitStack) -> Components:
    """Build the parts of a run; `resources` stops the processes that they start. Collective over the job.

    Args:
        config: with every ``auto`` resolved.
        layout: of the job.
        resources: closed by the caller.

    Raises:
        UserError: for a model, verifier, tokenizer or engine that cannot be used.
    """
    verifiers = resources.enter_context(build_pool(config.verifier, layout.is_leader))
    policy = Policy(config, layout)
    return Components(
        config=config,
        layout=layout,
        policy=policy,
        engine=build_engine(config, policy, resources),
        tokenization=Tokenization(config.model.path, policy.bridge.vocab_size, policy.bridge.context_length),
        verifiers=verifiers,
        checkpoints=Checkpoints(Path(config.run_directory) / "checkpoints", config.checkpoint),
    )
