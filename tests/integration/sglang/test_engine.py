"""The engine on the real SGLang: its log-probs are the trainer's, its weights follow, a dead server is replaced."""

from __future__ import annotations

import dataclasses
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from megatron_rlvr.backend import parallel
from megatron_rlvr.config import Config, ModelConfig, ParallelConfig, RolloutConfig, SGLangConfig
from megatron_rlvr.data.batch import RolloutBatch
from megatron_rlvr.errors import UserError
from megatron_rlvr.rollout.engine import Completion, SamplingPolicy
from tests.conftest import make_small_model

TEMPERATURE = 0.8
PROMPTS = [[3, 4, 5, 105, 9, 106], [7, 8, 9, 10, 105, 50, 106]]
SAMPLING = SamplingPolicy(samples=6, max_tokens=12, temperature=TEMPERATURE, stop_token_ids=tuple(range(0, 8)))


@pytest.fixture(scope="module")
def layout() -> Iterator[parallel.Layout]:
    with parallel.parallel_groups(ParallelConfig(), seed=0) as layout:
        yield layout


@pytest.fixture
def policy(layout: parallel.Layout, small_model: Path):
    from megatron_rlvr.backend.policy import Policy

    rollout = RolloutConfig(temperature=TEMPERATURE)
    return Policy(Config(model=ModelConfig(path=str(small_model)), rollout=rollout), layout)


@pytest.fixture
def engine(policy, servers, sglang: SGLangConfig, tmp_path: Path):
    """An engine of this test's own on the shared server, which it watches over as if it had started it."""
    from megatron_rlvr.rollout.sglang.engine import SGLangEngine

    config = Config(run_directory=str(tmp_path / "run"))
    config.rollout = RolloutConfig(sglang=dataclasses.replace(sglang, urls=servers.urls))
    with ExitStack() as resources:
        engine = SGLangEngine(config, policy, resources)
        engine.pool = servers
        yield engine
    servers.weights = (policy.bridge.path, 0)


def _difference(policy, prompts: list[list[int]], completions: list[Completion]) -> float:
    """The largest distance between the engine's log-probs and those of the trainer's scoring pass."""
    batch = RolloutBatch.from_completions(prompts, completions, [0.0] * len(completions), padding=109)
    scores = policy.score(batch, torch.zeros(len(completions)))
    engine = torch.tensor([value for completion in completions for value in completion.logprobs])
    return (scores.logprob - engine).abs().max().item()


def _change(policy, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parts[-1].parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)


def test_logprobs_are_the_trainer_s_before_and_after_each_sync(policy, engine, tmp_path: Path) -> None:
    completions = engine.generate(PROMPTS, SAMPLING, list(range(12)))
    assert len(completions) == 12 and {c.weight_version for c in completions} == {0}
    assert {c.finish_reason for c in completions} == {"stop", "length"}
    for completion in completions:
        ids = completion.token_ids
        assert (ids[-1] < 8) == (completion.finish_reason == "stop") and all(token >= 8 for token in ids[:-1])
        assert completion.finish_reason == "stop" or len(ids) == 12
    assert len({tuple(c.token_ids) for c in completions}) == 12
    assert _difference(policy, PROMPTS, completions) < 1e-4
    for version in (1, 2):
        _change(policy, seed=version)
        assert _difference(policy, PROMPTS, completions) > 1e-2  # the change is one that the comparison sees
        engine.update_weights(version)
        completions = engine.generate(PROMPTS, SAMPLING, list(range(12)))
        assert {c.weight_version for c in completions} == {version}
        assert _difference(policy, PROMPTS, completions) < 1e-4
    assert [folder.name for folder in (tmp_path / "run" / "sglang" / "weights").iterdir()] == ["step_000002"]


def test_top_k_leaves_logprobs_of_the_whole_vocabulary(policy, engine) -> None:
    sampling = dataclasses.replace(SAMPLING, top_k=3, top_p=0.9, stop_token_ids=())
    completions = engine.generate(PROMPTS, sampling, list(range(12)))
    assert all(len(c.token_ids) == 12 for c in completions)
    assert _difference(policy, PROMPTS, completions) < 1e-4


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "hung"])
def test_server_lost_in_a_rollout(number: signal.Signals, policy, engine, servers) -> None:
    _change(policy, seed=5)
    engine.update_weights(7)
    prompts = [[3 + p % 90, 4, 5, 105, 9, 106] for p in range(48)]
    sampling = SamplingPolicy(samples=8, max_tokens=40, temperature=TEMPERATURE)
    server = servers.servers[0]
    starts, log_end = server.starts, len(server.log.read_bytes())

    def strike() -> None:
        deadline = time.monotonic() + 60
        while b"Decode batch" not in server.log.read_bytes()[log_end:] and time.monotonic() < deadline:
            time.sleep(0.01)
        os.killpg(server.process.pid, number)

    thread = threading.Thread(target=strike)
    thread.start()
    completions = engine.generate(prompts, sampling, list(range(384)))
    thread.join()
    assert server.starts == starts + 1, "the rollout ended before the server was struck"
    assert len(completions) == 384 and {len(c.token_ids) for c in completions} == {40}
    assert {c.weight_version for c in completions} == {7}
    assert _difference(policy, prompts, completions) < 1e-4  # each answer belongs to its prompt, under the new weights


def test_context_is_too_short(engine) -> None:
    with pytest.raises(UserError, match=r"a prompt of 6 tokens and rollout.max_tokens=60 are more than .* 64 tokens"):
        engine.generate([PROMPTS[0]], dataclasses.replace(SAMPLING, max_tokens=60), list(range(6)))


def test_another_model_behind_the_url(layout, servers, sglang: SGLangConfig, tmp_path: Path) -> None:
    from megatron_rlvr.backend.policy import Policy
    from megatron_rlvr.rollout.sglang.engine import SGLangEngine

    other = make_small_model(tmp_path / "other", hidden=48)
    config = Config(model=ModelConfig(path=str(other)), run_directory=str(tmp_path / "run"))
    config.rollout = RolloutConfig(sglang=dataclasses.replace(sglang, urls=servers.urls))
    policy = Policy(config, layout)
    with ExitStack() as resources, pytest.raises(UserError, match="hidden_size=32 instead of 48"):
        SGLangEngine(config, policy, resources)
    assert servers.servers[0].answers(10.0)
