"""Importance weights in the trainer: from logits and hidden states, padded and packed, with and without steering."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_rlvr.control import ClipThresholds, SteeringResponse
from megatron_rlvr.megatron import parallel
from megatron_rlvr.megatron.config import ParallelConfig
from megatron_rlvr.objectives import UpdateObjective, build_objective
from megatron_rlvr.training.loss import LOSS_SUMS
from megatron_rlvr.training.step_importance import step_importance
from tests.update_faults import ADVANTAGE, build, make_batch

LOSS = LOSS_SUMS.index("loss")
CORRECTIONS = ["icepop", "mis + opsm(cap=0.02)", "m2po", "geometric(floor=0.9, cap=1.1) + tis(cap=1.2)"]


@pytest.fixture(scope="module")
def layout() -> Iterator[parallel.Layout]:
    with parallel.parallel_groups(ParallelConfig(), seed=0) as layout:
        yield layout


@pytest.mark.parametrize("text", CORRECTIONS)
def test_every_path_computes_the_same_update(text: str, layout: parallel.Layout, small_model: Path) -> None:
    found = {}
    for fused in (False, True):
        for packed in (False, True):
            policy = build(small_model, ParallelConfig(), layout)
            policy._head = replace(policy._head, fused=fused)
            if packed:
                policy.microbatching = replace(policy.microbatching, sequences=0, tokens=30)
            found[fused, packed] = train(policy, text)
    expected = found.pop((False, False))
    for path, measured in found.items():  # losses near ratio 1 are differences of nearly equal numbers
        assert measured == pytest.approx(expected, rel=1e-4, abs=2e-6), path


def train(policy, text: str) -> list[float]:
    """Loss and gradient norm of four updates, the last two of them steered."""
    batch = make_batch()
    scores = policy.score(batch, ADVANTAGE)
    generator = torch.Generator().manual_seed(2)
    batch.rollout_logprob = scores.logprob + 0.4 * torch.randn(33, generator=generator)
    weight = torch.full((8,), 1 / 33)
    chosen = build_objective("clip", importance=text)
    corrected = step_importance(chosen.importance, batch, ADVANTAGE, scores, 2, policy.layout)
    assert corrected is not None and 0 < corrected.masked.sum() < 33
    objective = UpdateObjective(chosen, ClipThresholds(), importance_weight=corrected.weight)
    steered = replace(objective, thresholds=ClipThresholds(steering=0.3), response=SteeringResponse(1.0, 1.0, 2.0, 0.5))
    measured = []
    for update, minibatch in zip((objective, objective, steered, steered), batch.minibatches(2) * 2, strict=True):
        report = policy.update(batch, minibatch, ADVANTAGE, weight, scores, update)
        measured += [float(report.sums[LOSS]), report.grad_norm]
    # The ratios of the first update are 1, so that its objective is the advantage times the weight.
    first = batch.minibatches(2)[0]
    in_first = torch.isin(batch.sequence_of_token(), first)
    times = torch.where(corrected.masked, 0.0, corrected.weight)
    by_hand = -(times * ADVANTAGE[batch.sequence_of_token()])[in_first].sum() / 33
    assert measured[0] == pytest.approx(float(by_hand), rel=1e-4, abs=1e-6)
    return measured
