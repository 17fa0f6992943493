"""What the collector makes of an engine's completions: groups that are worth training on, rollouts ahead of time."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_rlvr.config import Config, check
from megatron_rlvr.data.completion import Completion
from megatron_rlvr.data.config import DataConfig
from megatron_rlvr.errors import UserError
from megatron_rlvr.megatron import parallel
from megatron_rlvr.megatron.config import ModelConfig
from megatron_rlvr.rollout.collection import RolloutCollector
from megatron_rlvr.rollout.config import RolloutConfig
from megatron_rlvr.rollout.engines.base import EngineLostError, Finished, RolloutError, SamplingPolicy
from megatron_rlvr.rollout.mismatch import MismatchAlarm
from megatron_rlvr.rollout.prefetch import RolloutsAhead
from megatron_rlvr.rollout.sampling import sample_seed
from megatron_rlvr.rollout.tokenization import Tokenization
from megatron_rlvr.verifiers import Verdict, VerifierPool

ROLLOUT = RolloutConfig(prompts_per_step=8, samples_per_prompt=4, max_tokens=6)


class Engine:
    """Draws tokens from the seed; prompts whose first token is in `dull` always get the same completion."""

    def __init__(self, collective: bool, dull: Sequence[int] = ()):
        self.collective, self.dull = collective, dull
        self.asked: list[int] = []
        self.lost = False
        self.version = 0

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingPolicy,
        seeds: Sequence[int],
        finished: Finished | None = None,
    ) -> list[Completion]:
        if self.lost:
            raise EngineLostError("gone")
        self.asked.append(len(prompts))
        assert len(seeds) == len(prompts) * sampling.samples == len(set(seeds))
        every: list[Completion] = []
        for index, prompt in enumerate(prompts):
            group = []
            for sample in range(sampling.samples):
                token = 10 if prompt[0] in self.dull else 10 + sample % 2
                group.append(Completion([token] * (1 + sample), [-1.0] * (1 + sample), "stop", self.version))
            every += group
            if finished is not None and asyncio.run(finished(index, group)):  # type: ignore[arg-type]
                break
        return every

    def offload(self) -> None:
        pass

    def update_weights(self, version: int) -> None:
        self.version = version


@pytest.fixture(scope="module")
def layout():
    from megatron_rlvr.megatron.config import ParallelConfig

    with parallel.parallel_groups(ParallelConfig(), seed=0) as layout:
        yield layout


@pytest.fixture
def collector(layout, small_model: Path, problems: Path):
    def build(engine: Engine, /, **rollout: Any) -> RolloutCollector:
        config = Config(steps=6, model=ModelConfig(path=str(small_model)), data=DataConfig(train=str(problems)))
        config.rollout = dataclasses.replace(ROLLOUT, **rollout)
        config.run_directory = "unused"
        config.algorithm.minibatches = 2
        check(config)
        tokenization = Tokenization(small_model, 2**20)
        collector = RolloutCollector(config, layout, engine, tokenization, VerifierPool(lambda completion, answer: 0.0))
        collector.source.judge = lambda examples, samples, completions: (  # type: ignore[method-assign]
            [""] * len(completions),
            [Verdict(float(c.token_ids[0] == 11), "ok") for c in completions],
        )
        return collector

    return build


def test_completions_that_could_not_be_verified_are_counted(collector) -> None:
    one = collector(Engine(True))
    one.source.judge = lambda examples, samples, completions: (  # type: ignore[method-assign]
        [""] * len(completions),
        [Verdict(0.0, "timeout" if len(c.token_ids) == 1 else "ok") for c in completions],
    )
    assert one.collect(0)[1].metrics == {"verifier/failed_fraction": 0.25}


def _dull(collector: RolloutCollector, share: float) -> list[int]:
    """First tokens such that about `share` of the data begins with them."""
    first = [prompt[0] for prompt in collector.train[1]]
    return sorted(set(first))[: int(len(set(first)) * share)]


@pytest.mark.parametrize("collective", [True, False], ids=["collective", "streaming"])
@pytest.mark.parametrize("step", [0, 3])
def test_dynamic_sampling_fills_the_batch_with_groups_that_differ(collector, collective: bool, step: int) -> None:
    engine = Engine(collective)
    one = collector(engine, dynamic_sampling=True, refill_rounds=20)
    engine.dull = _dull(one, 0.5)
    batch, report = one.collect(step)
    assert batch.tokens.shape[0] == 32 and sum(engine.asked) > 8
    assert (batch.rewards.view(8, 4).amax(1) > batch.rewards.view(8, 4).amin(1)).all()
    assert not set(batch.tokens[:, 0].tolist()) & set(engine.dull)
    assert report.metrics["sampling/unfilled_fraction"] == 0
    assert report.metrics["sampling/generated_groups"] > 1.2
    assert report.metrics["sampling/reward"] < batch.rewards.mean()
    again, _ = collector(Engine(collective, engine.dull), dynamic_sampling=True, refill_rounds=20).collect(step)
    assert torch.equal(again.tokens, batch.tokens)  # a resumed run draws the same replacements


def test_without_dynamic_sampling_the_step_s_own_prompts_are_kept(collector) -> None:
    engine = Engine(False, range(1000))
    batch, report = collector(engine).collect(0)
    assert engine.asked == [8] and report.metrics == {"verifier/failed_fraction": 0.0} and batch.tokens.shape[0] == 32


@pytest.mark.parametrize("collective", [True, False], ids=["collective", "streaming"])
def test_what_cannot_be_filled_is_filled_with_what_there_is(collector, collective: bool) -> None:
    engine = Engine(collective, range(1000))
    batch, report = collector(engine, dynamic_sampling=True, refill_rounds=2).collect(0)
    assert engine.asked == [8, 8, 8] and batch.tokens.shape[0] == 32
    assert report.metrics["sampling/unfilled_fraction"] == 1 and report.metrics["sampling/generated_groups"] == 3


def test_over_sampling_drops_the_surplus(collector) -> None:
    engine = Engine(False)
    batch, report = collector(engine, dynamic_sampling=True, over_sampling=1.5).collect(0)
    assert engine.asked == [12] and batch.tokens.shape[0] == 32
    assert report.metrics["sampling/generated_groups"] == 1  # four prompts were not waited for


def test_overlong_responses_lose_advantage_but_not_reward(collector) -> None:
    engine = Engine(True)
    batch, report = collector(engine, max_tokens=4, overlong_buffer=2).collect(0)
    assert batch.response_lengths.view(8, 4)[0].tolist() == [1, 2, 3, 4]
    assert batch.penalty.view(8, 4)[0].tolist() == [0.0, 0.0, -0.5, -1.0]
    assert report.metrics["overlong_penalty"] == pytest.approx(-0.375)
    assert set(batch.rewards.tolist()) == {0.0, 1.0}


def test_what_the_user_must_mend_is_told_to_every_process(collector) -> None:
    """Under a type of its own, at which the loop writes a checkpoint; an evaluation is left out instead."""
    one = collector(Engine(False))

    def refuse(*_: Any) -> list[Completion]:
        raise UserError("a malformed reply")

    one.engine.generate = refuse
    with pytest.raises(RolloutError, match="a malformed reply"):
        one.collect(0)


def test_prompts_without_room_for_a_response_are_refused_at_the_start(
    layout, small_model: Path, problems: Path
) -> None:
    config = Config(steps=6, model=ModelConfig(path=str(small_model)), data=DataConfig(train=str(problems)))
    config.rollout, config.algorithm.minibatches = dataclasses.replace(ROLLOUT), 2
    pool = VerifierPool(lambda completion, answer: 0.0)
    longest = max(
        len(ids)
        for ids in RolloutCollector(config, layout, Engine(True), Tokenization(small_model, 2**20), pool).train[1]
    )
    fits = Tokenization(small_model, 2**20, context=longest + 6)
    RolloutCollector(config, layout, Engine(True), fits, pool)
    short = Tokenization(small_model, 2**20, context=longest + 5)
    with pytest.raises(
        UserError, match=rf"example \d+ of .* has {longest} tokens, and rollout.max_tokens=6 makes more"
    ):
        RolloutCollector(config, layout, Engine(True), short, pool)
    config.data.heldout, config.evaluation.max_tokens = str(problems), 7
    with pytest.raises(
        UserError, match=rf"evaluation.max_tokens=7 makes more than the model's context of {longest + 6}"
    ):
        RolloutCollector(config, layout, Engine(True), fits, pool)


def test_lost_engine_is_told_to_every_process(collector) -> None:
    engine = Engine(False)
    one = collector(engine)
    engine.lost = True
    with pytest.raises(EngineLostError, match="gone"):
        one.collect(0)


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_rollouts_ahead_begin_when_the_step_before_is_taken(depth: int) -> None:
    version, began = [0], {}

    def roll_out(step: int) -> int:
        began[step] = version[0]
        return 10 * step

    ahead = RolloutsAhead(roll_out, depth, end=8)
    for step in range(8):
        assert ahead.take(step) == 10 * step
        for future in ahead._under_way.values():
            future.result()
        version[0] = step + 1
    assert began == {step: max(0, step - depth) for step in range(8)}


def test_failure_ahead_is_raised_at_its_step() -> None:
    def roll_out(step: int) -> int:
        if step == 2:
            raise UserError("no")
        return step

    ahead = RolloutsAhead(roll_out, 2, end=8)
    assert [ahead.take(0), ahead.take(1)] == [0, 1]
    with pytest.raises(UserError, match="no"):
        ahead.take(2)


def test_mismatch_warns_then_stops(capsys) -> None:
    alarm = MismatchAlarm(threshold=0.1, patience=3)
    record = {"kl_rollout": 0.2, "mismatch/max": 4.0}
    assert alarm.observe(0, record) is None and alarm.observe(1, record) is None
    assert capsys.readouterr().err.count("warning: KL(rollout || train)") == 2
    assert alarm.observe(2, record | {"kl_rollout": 0.05}) is None
    assert [alarm.observe(step, record) is None for step in (3, 4, 5)] == [True, True, False]
    assert MismatchAlarm(0.0, 1).observe(0, record) is None


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"max_staleness": 1}, "max_staleness=1 needs rollout.engine=sglang"),
        ({"over_sampling": 0.5}, "over_sampling must be at least 1"),
        ({"overlong_buffer": 6}, "overlong_buffer=6 must be less than rollout.max_tokens=6"),
        ({"refill_rounds": -1}, "refill_rounds must be at least 0, not -1"),
        ({"engine": "recorded", "recording": "x", "dynamic_sampling": True}, "set rollout.dynamic_sampling=false"),
    ],
)
def test_impossible_sampling(collector, settings: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        collector(Engine(True), **settings)


def test_stop_texts_are_single_tokens(small_model: Path) -> None:
    tokenization = Tokenization(small_model, 2**20)
    ids = tokenization.stops([";"])
    assert set(tokenization.stop_token_ids) < set(ids) and len(ids) == len(tokenization.stop_token_ids) + 1
    with pytest.raises(UserError, match=r"rollout.stop: '=1' is 2 tokens"):
        tokenization.stops(["=1"])


def test_replacements_have_seeds_of_their_own(collector) -> None:
    one = collector(Engine(True))
    places = [one.source._replacement(2, number) for number in range(40)]
    assert len({slot for slot, _ in places}) == 40 and min(slot for slot, _ in places) == 8
    assert len({example for _, example in places}) > 25
    assert places == [one.source._replacement(2, number) for number in range(40)]
    assert sample_seed(0, 2, places[0][0], 0) != sample_seed(0, 2, 0, 0)
