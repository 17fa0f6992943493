"""Batch invariance on the CPU: log-probs of the local engine, the scoring pass and the first update, bit for bit."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_rlvr.config import Config
from megatron_rlvr.control import AffineThreshold, ClipThresholds
from megatron_rlvr.data.batch import RolloutBatch
from megatron_rlvr.errors import UserError
from megatron_rlvr.megatron import batch_invariance, parallel
from megatron_rlvr.megatron.config import ModelConfig, ParallelConfig
from megatron_rlvr.objectives import UpdateObjective, build_objective
from megatron_rlvr.rollout.config import RolloutConfig
from megatron_rlvr.rollout.sampling import SamplingSettings
from megatron_rlvr.training.config import AlgorithmConfig
from tests.generation import generate
from tests.small_model import make_small_model

PROMPTS = [[3 + i, 4, 5, 105, 9, 106] for i in range(5)] + [[7, 8, 9, 10, 105, 50, 11 + i, 106] for i in range(4)]
SAMPLING = SamplingSettings(samples=4, max_tokens=24, temperature=0.8, stop_token_ids=tuple(range(8)))
CUT = dataclasses.replace(SAMPLING, top_p=0.9, returns_kept=True)


@pytest.fixture(scope="module")
def layout() -> Iterator[parallel.Layout]:
    with parallel.parallel_groups(ParallelConfig(), seed=0) as layout:
        yield layout


def _policy(layout: parallel.Layout, model: Path, fused: bool = False, invariant: bool = True, sequences: int = 5):
    from megatron_rlvr.training.policy import Policy

    config = Config(
        model=ModelConfig(path=str(model), dtype="float32", layer_spec="local", batch_invariant=invariant),
        rollout=RolloutConfig(temperature=0.8),
        algorithm=AlgorithmConfig(fused_linear=fused),
        parallel=ParallelConfig(microbatch_sequences=sequences),
    )
    return Policy(config, layout)


def _rollout(policy, sampling: SamplingSettings, batch: int, invariant: bool = True) -> RolloutBatch:
    from megatron_rlvr.rollout.engines.local import LocalEngine

    completions = generate(LocalEngine(policy.model_chunks, batch=batch, invariant=invariant), PROMPTS, sampling)
    assert {c.finish_reason for c in completions} == {"stop", "length"}  # sequences leave the batch early
    return RolloutBatch.from_completions(PROMPTS, completions, [0.0, 1.0] * (len(completions) // 2), padding=109)


@pytest.mark.parametrize(
    ("sampling", "fused", "mixture"),
    [(SAMPLING, False, False), (CUT, True, False), (SAMPLING, True, True)],
    ids=["logits", "top-p-fused", "mixture"],
)
def test_the_engine_the_scoring_pass_and_the_first_update_agree_bit_for_bit(
    sampling: SamplingSettings,
    fused: bool,
    mixture: bool,
    layout: parallel.Layout,
    small_model: Path,
    tmp_path: Path,
) -> None:
    if mixture:
        small_model = make_small_model(tmp_path / "mixture", mixture=True)
    policy = _policy(layout, small_model, fused)
    batch = _rollout(policy, sampling, batch=12)
    scores = policy.score(batch)
    assert batch.token_count > 300
    assert torch.equal(scores.logprob, batch.rollout_logprob)
    # Other batches of the engine and other microbatches change nothing.
    again = _rollout(policy, sampling, batch=1000)
    assert torch.equal(again.tokens, batch.tokens) and torch.equal(again.rollout_logprob, batch.rollout_logprob)
    assert torch.equal(_policy(layout, small_model, fused, sequences=7).score(batch).logprob, scores.logprob)
    thresholds = ClipThresholds(AffineThreshold(0.2), AffineThreshold(0.2))
    sequences = torch.tensor([1, 2, 30, 17, 8, 35])
    advantage = torch.linspace(-1.0, 1.0, len(batch.tokens))
    weight = torch.full((len(batch.tokens),), 1e-3)
    objective = UpdateObjective(build_objective("clip"), thresholds)
    report = policy.update(batch, sequences, advantage, weight, scores, objective)
    assert report.ratio_max == 1.0 and report.applied


def test_without_it_they_differ_in_the_last_bits(layout: parallel.Layout, small_model: Path) -> None:
    policy = _policy(layout, small_model, invariant=False)
    batch = _rollout(policy, SAMPLING, batch=12, invariant=False)
    scores = policy.score(batch)
    assert 0 < (scores.logprob - batch.rollout_logprob).abs().max() < 1e-5


def test_gradients_are_those_of_plain_attention(layout: parallel.Layout) -> None:
    generator = torch.Generator().manual_seed(2)
    shapes = ((2, 4, 21, 8), (2, 2, 21, 8), (2, 2, 21, 8))
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes]
    expected = torch.nn.functional.scaled_dot_product_attention(*inputs, is_causal=True, scale=0.3, enable_gqa=True)
    found = batch_invariance.attention(*inputs, None, 0.3)
    assert torch.allclose(found, expected)
    ours, theirs = (torch.autograd.grad(x.square().sum(), inputs) for x in (found, expected))
    assert all(torch.allclose(a, b) for a, b in zip(ours, theirs, strict=True))


def test_a_matrix_library_whose_rows_depend_on_each_other_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    batch_invariance.check_products([torch.randn(40, 24)])
    monkeypatch.setattr(batch_invariance, "product", lambda a, b: torch.mm(a, b) + 1e-6 * a.sum())
    with pytest.raises(UserError, match=r"depends on the other rows: set it to false"):
        batch_invariance.check_products([torch.randn(40, 24)])
