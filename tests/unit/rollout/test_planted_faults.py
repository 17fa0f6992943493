"""Faults planted in the rollouts of the quickstart's model ring within two steps; rounding and nothing do not."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_rlvr.config import Config, resolve
from megatron_rlvr.data.batch import RolloutBatch
from megatron_rlvr.megatron import parallel
from megatron_rlvr.megatron.config import ModelConfig, ParallelConfig
from megatron_rlvr.objectives import build_objective
from megatron_rlvr.rollout.engines.base import GroupRequest
from megatron_rlvr.rollout.mismatch import MismatchAlarm
from megatron_rlvr.rollout.sampling import SamplingSettings
from megatron_rlvr.rollout.tokenization import Tokenization
from megatron_rlvr.rollout.worst_tokens import worst_tokens
from megatron_rlvr.telemetry.samples import write_worst_tokens
from megatron_rlvr.training.rollout_metrics import measure_rollout
from tests.planted_faults import FAULTS, HEALTHY, Fault, FaultyEngine, noise, permuted_expert
from tests.processes import ROOT

MODEL = ROOT / "examples" / "quickstart" / "base_model"
SAMPLES = 8


@pytest.fixture(scope="module")
def layout() -> Iterator[parallel.Layout]:
    with parallel.parallel_groups(ParallelConfig(), seed=0) as layout:
        yield layout


class Run:
    """The rollouts of some steps and their alarm, without updates: what a run does before each of them."""

    def __init__(self, model: Path, layout: parallel.Layout, prompts: int = 64):
        from megatron_rlvr.training.policy import Policy

        config = Config(model=ModelConfig(path=str(model), dtype="float32", layer_spec="local"))
        config.rollout.samples_per_prompt, config.rollout.max_tokens = SAMPLES, 18
        self.config, self.layout = resolve(config, on_gpu=False), layout
        self.policy = Policy(self.config, layout)
        self.tokenization = Tokenization(model, 2**20)
        rng = random.Random(1)
        texts = [
            " ".join(str(rng.randint(1, 9)) for _ in range(3)) + f" : {rng.randint(5, 60)} >" for _ in range(prompts)
        ]
        self.prompts = [self.tokenization.tokenizer.encode(text, add_special_tokens=False) for text in texts]

    def step(self, engine: FaultyEngine, step: int, alarm: MismatchAlarm) -> tuple[RolloutBatch, dict[str, float]]:
        seeds = range(step * 10**6, step * 10**6 + len(self.prompts) * SAMPLES)
        requests = [
            GroupRequest(prompt, seeds[i * SAMPLES : (i + 1) * SAMPLES], (step, i))
            for i, prompt in enumerate(self.prompts)
        ]
        sampling = SamplingSettings.for_training(self.config.rollout, self.tokenization.stop_token_ids)
        completions = [completion for group in engine.generate(requests, sampling) for completion in group]
        batch = RolloutBatch.from_completions(self.prompts, completions, [0.0] * len(completions), 0)
        self.scores = self.policy.score(batch, torch.zeros(len(completions)))
        measured = measure_rollout(batch, torch.ones(len(completions)), self.scores, self.layout)
        alarm.observe(step, measured.metrics)
        return batch, measured.metrics

    def first_ring(self, fault: Fault) -> int | None:
        """The first of three steps of which the alarm warns; the fault begins at step 1."""
        engine = FaultyEngine(self.policy.model_chunks, 1024, fault, start=1)
        current = engine.history[0]
        engine.history.insert(0, noise(0.03)(current, current))  # a step of updates moves the weights about as far
        alarm = MismatchAlarm.build(self.config, True, True)
        return next((step for step in range(3) if self.step(engine, step, alarm) and alarm.warned), None)


@pytest.fixture(scope="module")
def run(layout: parallel.Layout) -> Run:
    return Run(MODEL, layout)


# The others are smaller: in rollouts as short as these, chance could hide them. `make mismatch-study` plants all.
@pytest.mark.parametrize(
    "name", ["other-weights", "fp8-as-reported", "top-p", "top-p-unseen", "temperature", "stale-layer"]
)
def test_a_planted_fault_rings_within_two_steps(name: str, run: Run) -> None:
    assert run.first_ring(FAULTS[name]) in (1, 2)


def test_rounding_to_bfloat16_does_not_ring(run: Run) -> None:
    assert run.first_ring(HEALTHY["bf16"]) is None


def test_a_permuted_expert_rings(layout: parallel.Layout, tmp_path: Path) -> None:
    from tests.small_model import make_small_model

    mixture = Run(make_small_model(tmp_path, mixture=True), layout, prompts=16)
    assert mixture.first_ring(Fault(permuted_expert)) == 1


def test_the_worst_tokens_are_those_that_the_fault_moved(run: Run, tmp_path: Path) -> None:
    engine = FaultyEngine(run.policy.model_chunks, 1024, FAULTS["fp8"])
    alarm = MismatchAlarm.build(run.config, True, True)
    batch, metrics = run.step(engine, 0, alarm)
    assert alarm.detail == 20
    write_worst_tokens(tmp_path, 0, worst_tokens(alarm.detail, batch, run.scores, run.tokenization, run.layout))
    rows = [json.loads(line) for line in (tmp_path / "mismatch" / "step_000000.jsonl").read_text().splitlines()]
    assert len(rows) == 20 and abs(rows[0]["difference"]) == pytest.approx(metrics["mismatch/max"])
    difference = (run.scores.logprob - batch.rollout_logprob).abs()
    assert [abs(row["difference"]) for row in rows] == pytest.approx(difference.topk(20).values.tolist())
    for row in rows:
        assert row["logprob"] - row["rollout_logprob"] == pytest.approx(row["difference"])
        assert row["text"] and row["before"]
        assert 0 <= row["position"] < row["length"] and row["age"] == 0
    assert worst_tokens(0, batch, run.scores, run.tokenization, run.layout) == []


def test_corrections_do_not_change_what_is_measured(run: Run) -> None:
    """The alarm looks at the rollouts, whatever the objective makes of them."""
    from megatron_rlvr.training.step_importance import step_importance

    alarm = MismatchAlarm.build(run.config, True, True)
    batch, metrics = run.step(FaultyEngine(run.policy.model_chunks, 1024, FAULTS["fp8"]), 0, alarm)
    importance = build_objective("clip", importance="icepop(floor=0.9, cap=1.1)").importance
    assert importance is not None
    corrected = step_importance(importance, batch, torch.ones(len(batch.tokens)), run.scores, 1, run.layout)
    again = measure_rollout(batch, torch.ones(len(batch.tokens)), run.scores, run.layout, corrected).metrics
    assert {name: value for name, value in again.items() if "fraction" not in name or name in metrics} == metrics
    assert 0 < again["mismatch/masked_fraction"] < 0.2
