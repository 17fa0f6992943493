"""Routing replay within one process: the local engine's own routes, and what is counted."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch

from megatron_rlvr.config import Config
from megatron_rlvr.data.batch import RolloutBatch
from megatron_rlvr.data.routes import BatchRoutes
from megatron_rlvr.megatron import parallel
from megatron_rlvr.megatron.config import ModelConfig, OptimizerConfig, ParallelConfig
from megatron_rlvr.rollout.config import RolloutConfig
from megatron_rlvr.rollout.engines.local import LocalEngine
from megatron_rlvr.rollout.sampling import SamplingSettings
from tests.families import make_family
from tests.generation import generate

PROMPTS = [[3, 4, 5, 9], [7, 8, 9, 10, 50, 6, 11]]


@pytest.fixture(scope="module")
def layout() -> Iterator[parallel.Layout]:
    with parallel.parallel_groups(ParallelConfig(), seed=0) as layout:
        yield layout


@pytest.fixture(scope="module", params=["qwen3-moe", "glm4-moe"])
def policy(request: pytest.FixtureRequest, layout: parallel.Layout, tmp_path_factory: pytest.TempPathFactory):
    from megatron_rlvr.training.policy import Policy

    folder = make_family(tmp_path_factory.mktemp("model") / request.param, request.param)
    config = Config(
        model=ModelConfig(path=str(folder), dtype="float32", layer_spec="local"),
        rollout=RolloutConfig(routing_replay=True),
        optimizer=OptimizerConfig(learning_rate=1e-12),
        parallel=ParallelConfig(microbatch_sequences=3),
    )
    return Policy(config, layout)


def rollout(policy) -> RolloutBatch:
    sampling = SamplingSettings(samples=4, max_tokens=6, stop_token_ids=tuple(range(40)), routers=policy.routers)
    completions = generate(LocalEngine(policy.model_chunks, batch=4), PROMPTS, sampling)
    lengths = [len(PROMPTS[i // 4]) + len(c.token_ids) - 1 for i, c in enumerate(completions)]
    assert [len(c.routes.experts) for c in completions if c.routes] == lengths and len(set(lengths)) > 2
    return RolloutBatch.from_completions(PROMPTS, completions, [0.0] * 8, padding=0)


def test_routes_of_the_local_engine_are_those_that_training_chooses(policy, layout: parallel.Layout) -> None:
    from megatron_rlvr.training.routing_metrics import routing_metrics

    batch, advantage = rollout(policy), torch.ones(8)
    scores = policy.score(batch, advantage)
    assert (scores.logprob - batch.rollout_logprob).abs().max() < 2e-5
    metrics = routing_metrics(policy, batch, advantage, layout, compare=False)
    assert metrics == {"routing_replay/differing": 0.0, "routing_replay/unknown_fraction": 0.0}


def test_what_differs_is_counted(policy, layout: parallel.Layout, capsys: pytest.CaptureFixture[str]) -> None:
    from megatron_rlvr.training.routing_metrics import _warn_of_unknown_routes, routing_metrics

    _warn_of_unknown_routes.cache_clear()  # it warns once per process
    batch, advantage = rollout(policy), torch.ones(8)
    own = policy.score(batch, advantage)
    policy.take_route_counts()
    # In the last layer of the first five tokens, one expert becomes another that the router did not choose. This
    # changes no choice of an earlier layer. The last sequence loses its routes.
    experts = batch.routes.experts.clone()
    for token in range(5):
        experts[token, -1, 0] = next(e for e in range(4) if e not in experts[token, -1].tolist())
    counts = batch.routes.counts.clone()
    experts, counts[-1] = experts[: -int(counts[-1])], 0
    changed = dataclasses.replace(batch, routes=BatchRoutes(experts, counts, batch.routes.routers))
    scores = policy.score(changed, advantage)
    capsys.readouterr()
    metrics = routing_metrics(policy, changed, advantage, layout, compare=True)
    assert capsys.readouterr().err.count("are not replayed") == 1
    assert metrics["routing_replay/differing"] == 5 / experts.numel()
    assert metrics["routing_replay/unknown_fraction"] == 1 / 8
    first = int(batch.response_lengths[0])
    assert (scores.logprob - own.logprob)[:first].abs().max() > 1e-4
    assert (scores.logprob - own.logprob)[first:].abs().max() < 1e-6
    # Without replay the routers choose what the engine's routers chose, so there is no mismatch.
    assert metrics["routing_replay/mismatch_without"] < 1e-6
    assert 0 <= metrics["routing_replay/kl_rollout_without"] < 1e-10
    # The comparison counts nothing.
    assert policy.take_route_counts().tolist() == [0, 0]


def test_without_routes_a_policy_records_nothing(policy, layout: parallel.Layout) -> None:
    from megatron_rlvr.training.routing_metrics import routing_metrics

    sampling = SamplingSettings(samples=4, max_tokens=3)
    completions = generate(LocalEngine(policy.model_chunks, batch=4), PROMPTS, sampling)
    assert all(c.routes is None for c in completions)
    batch = RolloutBatch.from_completions(PROMPTS, completions, [0.0] * 8, padding=0)
    assert routing_metrics(policy, batch, torch.ones(8), layout, compare=True) == {}


def test_the_fused_router_is_off_in_the_routers_alone(policy) -> None:
    from megatron_rlvr.megatron.routing_replay import connect

    (chunk,) = policy.model_chunks
    chunk.config.moe_router_fusion = True  # as with Transformer Engine's layers
    try:
        connect(policy.model_chunks, policy.routers)
        assert chunk.config.moe_router_fusion
        routers = [layer.mlp.router for layer in chunk.decoder.layers if hasattr(layer.mlp, "router")]
        assert len(routers) == len(policy.routers.routed)
        assert not any(router.config.moe_router_fusion for router in routers)
    finally:
        chunk.config.moe_router_fusion = False
        connect(policy.model_chunks, policy.routers)
