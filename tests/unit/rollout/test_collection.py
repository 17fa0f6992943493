"""The rollout collector with a scripted engine and a real verifier pool; prefetching; the mismatch alarm."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from scripted_engine import WRONG, ScriptedEngine, repeats_the_right_token

from megatron_rlvr.config import Config, check
from megatron_rlvr.data.completion import Completion
from megatron_rlvr.data.config import DataConfig
from megatron_rlvr.errors import UserError
from megatron_rlvr.megatron.config import ModelConfig
from megatron_rlvr.rollout.collection import RolloutCollector
from megatron_rlvr.rollout.config import RolloutConfig
from megatron_rlvr.rollout.engines.base import EngineLostError, RolloutError
from megatron_rlvr.rollout.evaluation import Evaluator
from megatron_rlvr.rollout.mismatch import MismatchAlarm
from megatron_rlvr.rollout.prefetch import RolloutPrefetcher
from megatron_rlvr.rollout.sampling import sample_seed
from megatron_rlvr.rollout.tokenization import Tokenization
from megatron_rlvr.verifiers import Verifier, VerifierPool

ROLLOUT = RolloutConfig(prompts_per_step=8, samples_per_prompt=4, max_tokens=6)


@pytest.fixture
def collector(layout, small_model: Path, problems: Path):
    def build(
        engine: ScriptedEngine, /, verifier: Verifier = repeats_the_right_token, **rollout: Any
    ) -> RolloutCollector:
        config = Config(steps=6, model=ModelConfig(path=str(small_model)), data=DataConfig(train=str(problems)))
        config.rollout = dataclasses.replace(ROLLOUT, **rollout)
        config.run_directory = "unused"
        config.algorithm.minibatches = 2
        check(config)
        return RolloutCollector(config, layout, engine, Tokenization(small_model, 2**20), VerifierPool(verifier))

    return build


def fails_on_one_token(completion: str, answer: Any) -> float:
    if completion.split() == [str(WRONG)]:
        raise KeyError("one token")
    return repeats_the_right_token(completion, answer)


@pytest.mark.parametrize("streaming", [False, True], ids=["batch", "streaming"])
def test_completions_that_could_not_be_verified_are_counted(collector, streaming: bool) -> None:
    batch, report = collector(ScriptedEngine(streaming), fails_on_one_token).collect(0)
    assert report.metrics == {"verifier/failed_fraction": 0.25}
    assert batch.rewards.view(8, 4).tolist() == [[0.0, 1.0, 0.0, 1.0]] * 8


def _dull(collector: RolloutCollector, share: float) -> list[int]:
    """First tokens with which about `share` of the prompts begin."""
    first = [prompt[0] for prompt in collector.prompts.token_ids]
    return sorted(set(first))[: int(len(set(first)) * share)]


@pytest.mark.parametrize("streaming", [False, True], ids=["batch", "streaming"])
@pytest.mark.parametrize("step", [0, 3])
def test_dynamic_sampling_fills_the_batch_with_groups_that_differ(collector, streaming: bool, step: int) -> None:
    engine = ScriptedEngine(streaming)
    one = collector(engine, dynamic_sampling=True, refill_rounds=20)
    engine.dull = _dull(one, 0.5)
    batch, report = one.collect(step)
    assert batch.tokens.shape[0] == 32 and sum(engine.asked) > 8
    assert (batch.rewards.view(8, 4).amax(1) > batch.rewards.view(8, 4).amin(1)).all()
    assert not set(batch.tokens[:, 0].tolist()) & set(engine.dull)
    assert report.metrics["sampling/unfilled_fraction"] == 0
    assert report.metrics["sampling/generated_groups"] > 1.2
    assert report.metrics["sampling/reward"] < batch.rewards.mean()
    again, _ = collector(ScriptedEngine(streaming, engine.dull), dynamic_sampling=True, refill_rounds=20).collect(step)
    assert torch.equal(again.tokens, batch.tokens)  # a resumed run draws the same replacements


def test_without_dynamic_sampling_no_prompt_is_replaced(collector) -> None:
    engine = ScriptedEngine(True, range(1000))
    batch, report = collector(engine).collect(0)
    assert engine.asked == [8] and report.metrics == {"verifier/failed_fraction": 0.0} and batch.tokens.shape[0] == 32


@pytest.mark.parametrize("streaming", [False, True], ids=["batch", "streaming"])
def test_uninformative_groups_fill_the_batch_when_refilling_ends(collector, streaming: bool) -> None:
    engine = ScriptedEngine(streaming, range(1000))
    batch, report = collector(engine, dynamic_sampling=True, refill_rounds=2).collect(0)
    assert engine.asked == [8, 8, 8] and batch.tokens.shape[0] == 32
    assert report.metrics["sampling/unfilled_fraction"] == 1 and report.metrics["sampling/generated_groups"] == 3


def test_over_sampling_drops_the_surplus(collector) -> None:
    engine = ScriptedEngine(True)
    batch, report = collector(engine, dynamic_sampling=True, over_sampling=1.5).collect(0)
    assert engine.asked == [12] and batch.tokens.shape[0] == 32
    assert report.metrics["sampling/generated_groups"] == 1  # the other four prompts were cancelled


def test_overlong_responses_lose_advantage_but_not_reward(collector) -> None:
    engine = ScriptedEngine(False)
    batch, report = collector(engine, max_tokens=4, overlong_buffer=2).collect(0)
    assert batch.response_lengths.view(8, 4)[0].tolist() == [1, 2, 3, 4]
    assert batch.penalty.view(8, 4)[0].tolist() == [0.0, 0.0, -0.5, -1.0]
    assert report.metrics["overlong_penalty"] == pytest.approx(-0.375)
    assert set(batch.rewards.tolist()) == {0.0, 1.0}


def test_a_user_error_becomes_a_rollout_error_on_every_process(collector) -> None:
    """The training loop writes a checkpoint when it catches this type."""
    one = collector(ScriptedEngine(True))

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
        for ids in RolloutCollector(
            config, layout, ScriptedEngine(False), Tokenization(small_model, 2**20), pool
        ).prompts.token_ids
    )
    fits = Tokenization(small_model, 2**20, context=longest + 6)
    RolloutCollector(config, layout, ScriptedEngine(False), fits, pool)
    short = Tokenization(small_model, 2**20, context=longest + 5)
    with pytest.raises(
        UserError, match=rf"example \d+ of .* has {longest} tokens, which with rollout.max_tokens=6 exceed"
    ):
        RolloutCollector(config, layout, ScriptedEngine(False), short, pool)
    config.data.heldout, config.evaluation.max_tokens = str(problems), 7
    with pytest.raises(UserError, match=rf"evaluation.max_tokens=7 exceed the model's context of {longest + 6}"):
        Evaluator(config, layout, ScriptedEngine(False), fits, pool)


def test_a_lost_engine_is_reported_to_every_process(collector) -> None:
    engine = ScriptedEngine(True)
    one = collector(engine)
    engine.lost = True
    with pytest.raises(EngineLostError, match="gone"):
        one.collect(0)


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_a_prefetched_rollout_starts_depth_steps_ahead(depth: int) -> None:
    version, began = [0], {}

    def roll_out(step: int) -> int:
        began[step] = version[0]
        return 10 * step

    prefetcher = RolloutPrefetcher(roll_out, depth, end=8)
    for step in range(8):
        assert prefetcher.take(step) == 10 * step
        for future in prefetcher._pending.values():
            future.result()
        version[0] = step + 1
    assert began == {step: max(0, step - depth) for step in range(8)}


def test_a_failed_prefetch_is_raised_at_its_step() -> None:
    def roll_out(step: int) -> int:
        if step == 2:
            raise UserError("no")
        return step

    prefetcher = RolloutPrefetcher(roll_out, 2, end=8)
    assert [prefetcher.take(0), prefetcher.take(1)] == [0, 1]
    with pytest.raises(UserError, match="no"):
        prefetcher.take(2)


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
        collector(ScriptedEngine(False), **settings)


def test_stop_texts_are_single_tokens(small_model: Path) -> None:
    tokenization = Tokenization(small_model, 2**20)
    ids = tokenization.stops([";"])
    assert set(tokenization.stop_token_ids) < set(ids) and len(ids) == len(tokenization.stop_token_ids) + 1
    with pytest.raises(UserError, match=r"rollout.stop: '=1' is 2 tokens"):
        tokenization.stops(["=1"])


def test_replacements_have_different_seeds(collector) -> None:
    one = collector(ScriptedEngine(False))
    places = [one.source._replacement(2, number) for number in range(40)]
    assert len({slot for slot, _ in places}) == 40 and min(slot for slot, _ in places) == 8
    assert len({example for _, example in places}) > 25
    assert places == [one.source._replacement(2, number) for number in range(40)]
    assert sample_seed(0, 2, places[0][0], 0) != sample_seed(0, 2, 0, 0)
