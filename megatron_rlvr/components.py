"""The components that training, evaluation and measurement programs are built from."""

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
    """A policy with its rollout engine, tokenizer, verifiers and checkpoints.

    Attributes:
        config: configuration of the run, with every ``auto`` resolved.
        layout: position of this process in the process groups.
        policy: the trained model; it has the weights of ``model.path`` until a checkpoint is loaded.
        engine: generates completions. After a change of the policy's weights it needs `RolloutEngine.update_weights`.
        tokenization: tokenizer of the model.
        verifiers: computes rewards.
        checkpoints: reads and writes the checkpoints of the run directory.
    """

    config: Config
    layout: Layout
    policy: Policy
    engine: RolloutEngine
    tokenization: Tokenization
    verifiers: VerifierPool
    checkpoints: Checkpoints

    def collector(self) -> RolloutCollector:
        """Build the collector of training rollouts; this reads and checks the training data."""
        return RolloutCollector(
            self.config,
            self.layout,
            self.engine,
            self.tokenization,
            self.verifiers,
            self.policy.routers,
            self.policy.own_routers,
        )

    def evaluator(self) -> Evaluator | None:
        """Build the evaluator; this reads and checks the held-out data. None without ``data.heldout``."""
        if self.config.data.heldout is None:
            return None
        return Evaluator(self.config, self.layout, self.engine, self.tokenization, self.verifiers)


def build_components(config: Config, layout: Layout, resources: ExitStack) -> Components:
    """Build the components of a run. Collective over the job.

    Args:
        config: configuration with every ``auto`` resolved.
        layout: position of this process in the process groups.
        resources: stops the processes that the components start, when the caller closes it.

    Raises:
        UserError: if the model, verifier, tokenizer or engine cannot be used.
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
