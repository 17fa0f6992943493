"""Weight decay reaches matrices and leaves norms and biases alone, also after a resume from an older checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_rlvr.config import Config
from megatron_rlvr.control import ClipThresholds
from megatron_rlvr.data.batch import RolloutBatch
from megatron_rlvr.data.completion import Completion
from megatron_rlvr.megatron import parallel
from megatron_rlvr.megatron.config import ModelConfig, OptimizerConfig, ParallelConfig
from megatron_rlvr.objectives import UpdateObjective, build_objective
from megatron_rlvr.training.checkpoint import Checkpoints
from megatron_rlvr.training.config import CheckpointConfig

RATE, DECAY = 0.1, 0.25


@pytest.fixture(scope="module")
def layout() -> Iterator[parallel.Layout]:
    with parallel.parallel_groups(ParallelConfig(distributed_optimizer=True), seed=0) as layout:
        yield layout


def build_policy(layout: parallel.Layout, model: Path, distributed: bool):
    from megatron_rlvr.training.policy import Policy

    config = Config(
        model=ModelConfig(path=str(model), dtype="float32", layer_spec="local"),
        optimizer=OptimizerConfig(learning_rate=RATE, weight_decay=DECAY),
        parallel=ParallelConfig(microbatch_sequences=2, distributed_optimizer=distributed),
    )
    return Policy(config, layout)


def update_without_gradient(policy) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Take a step whose advantages are 0, so that only weight decay moves weights; returns each before and after."""
    completions = [Completion([3, 4, 5], [-1.0] * 3, "stop", 0) for _ in range(2)]
    batch = RolloutBatch.from_completions([[3, 4]], completions, [0.0, 0.0], padding=109)
    before = {name: p.detach().clone() for name, p in policy.model_chunks[0].named_parameters()}
    objective = UpdateObjective(build_objective("clip"), ClipThresholds())
    zeros = torch.zeros(2)
    policy.update(batch, torch.arange(2), zeros, torch.full((2,), 0.1), policy.score(batch, zeros), objective)
    return {name: (before[name], p.detach()) for name, p in policy.model_chunks[0].named_parameters()}


def check_decay(weights: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
    vectors = 0
    for name, (before, after) in weights.items():
        vectors += before.dim() == 1
        expected = before if before.dim() == 1 else before * (1 - RATE * DECAY)
        torch.testing.assert_close(after, expected, rtol=1e-6, atol=0, msg=name)
    assert vectors > 8  # norms and the biases of queries, keys and values


@pytest.mark.parametrize("distributed", [False, True])
def test_norms_and_biases_do_not_decay(distributed: bool, layout: parallel.Layout, small_model: Path) -> None:
    check_decay(update_without_gradient(build_policy(layout, small_model, distributed)))


@pytest.mark.parametrize("distributed", [False, True])
def test_nor_after_a_checkpoint_in_which_every_group_decays(
    distributed: bool, layout: parallel.Layout, small_model: Path, tmp_path: Path
) -> None:
    older = build_policy(layout, small_model, distributed)
    update_without_gradient(older)
    for group in older.optimizer.param_groups:
        group["weight_decay"] = DECAY  # as every group had it before
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    checkpoints.save(1, older, {}, {})
    resumed = build_policy(layout, small_model, distributed)
    checkpoints.load(1, resumed)
    check_decay(update_without_gradient(resumed))
