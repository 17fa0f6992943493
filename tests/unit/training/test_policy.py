"""The two passes of a step, and the local engine, against transformers in float64, with every formula written out."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_rlvr.config import Config
from megatron_rlvr.control import AffineThreshold, ClipThresholds
from megatron_rlvr.data.batch import RolloutBatch
from megatron_rlvr.data.completion import Completion
from megatron_rlvr.data.kept_tokens import KeptTokens
from megatron_rlvr.megatron import parallel
from megatron_rlvr.megatron.config import ModelConfig, OptimizerConfig, ParallelConfig
from megatron_rlvr.objectives import UpdateObjective, build_objective
from megatron_rlvr.rollout.config import RolloutConfig
from megatron_rlvr.rollout.sampling import SamplingSettings
from megatron_rlvr.training.config import AlgorithmConfig
from tests.generation import generate

TEMPERATURE = 0.8
LEARNING_RATE = 0.02
PROMPTS = [[3, 4, 5, 105, 9, 106], [7, 8, 9, 10, 105, 50, 106]]
THRESHOLDS = ClipThresholds(lower=AffineThreshold(0.3, -0.13), upper=AffineThreshold(0.5, -0.25))


@pytest.fixture(scope="module")
def layout() -> Iterator[parallel.Layout]:
    with parallel.parallel_groups(ParallelConfig(), seed=0) as layout:
        yield layout


@pytest.fixture(params=[False, True], ids=["logits", "fused"])
def policy(request: pytest.FixtureRequest, layout: parallel.Layout, small_model: Path):
    from megatron_rlvr.training.policy import Policy

    config = Config(
        model=ModelConfig(path=str(small_model), dtype="float32", layer_spec="local"),
        rollout=RolloutConfig(temperature=TEMPERATURE),
        optimizer=OptimizerConfig(learning_rate=LEARNING_RATE, clip_grad=1e9),
        algorithm=AlgorithmConfig(fused_linear=request.param),
        parallel=ParallelConfig(microbatch_sequences=3),
    )
    return Policy(config, layout)


@pytest.fixture
def reference(small_model: Path):
    from transformers import Qwen2ForCausalLM

    return Qwen2ForCausalLM.from_pretrained(small_model).double()


@pytest.fixture(params=["all", "kept"])
def batch(request: pytest.FixtureRequest) -> RolloutBatch:
    """Tokens drawn from the whole vocabulary, and from kept sets of 1 to all 110 tokens."""
    generator = torch.Generator().manual_seed(1)
    # In transformers the pad token (109) gets no embedding gradient, so no response contains it.
    responses = [torch.randint(0, 108, (n,), generator=generator).tolist() for n in (4, 1, 7, 3, 6, 2, 5, 5)]
    sizes = itertools.cycle([1, 2, 5, 30, 110])

    def kept(token: int) -> list[int]:
        others = [i for i in torch.randperm(110, generator=generator).tolist() if i != token]
        return [token, *others[: next(sizes) - 1]]

    completions = [
        Completion(r, [-1.0] * len(r), "stop", 0, kept=KeptTokens.of([kept(token) for token in r]))
        if request.param == "kept"
        else Completion(r, [-1.0] * len(r), "stop", 0)
        for r in responses
    ]
    return RolloutBatch.from_completions(PROMPTS, completions, [0, 1, 1, 0, 0, 0, 0, 1], padding=109)


ADVANTAGE = torch.tensor([-0.9, 1.1, 0.7, -0.9, -0.5, 1.3, -0.5, 1.7])


def _reference_logprobs(model, batch: RolloutBatch) -> torch.Tensor:
    """float64 log-probabilities [T, V] of every response position, one sequence at a time."""
    rows = []
    for tokens, prompt, response in zip(batch.tokens, batch.prompt_lengths, batch.response_lengths, strict=True):
        end = prompt + response
        logits = model(tokens[None, :end]).logits[0, prompt - 1 : end - 1]
        rows.append((logits / TEMPERATURE).log_softmax(-1))
    logprobs = torch.cat(rows)
    if batch.kept is not None:
        logprobs = logprobs.masked_fill(~batch.kept.mask(0, logprobs.shape[1]), -torch.inf).log_softmax(-1)
    return logprobs


def _targets(batch: RolloutBatch) -> torch.Tensor:
    rows = zip(batch.tokens, batch.prompt_lengths, batch.response_lengths, strict=True)
    return torch.cat([tokens[p : p + r] for tokens, p, r in rows])


def test_score_is_exact(policy, reference, batch: RolloutBatch) -> None:
    scores = policy.score(batch, ADVANTAGE)
    with torch.no_grad():
        logprobs = _reference_logprobs(reference, batch)
    taken = logprobs.gather(1, _targets(batch)[:, None])[:, 0]
    prob = logprobs.exp()
    logprobs = logprobs.masked_fill(prob == 0, 0.0)  # 0 ln 0 is 0
    entropy = -(prob * logprobs).sum(1)
    assert (scores.logprob - taken).abs().max() < 5e-6
    assert (scores.entropy - entropy).abs().max() < 5e-6
    # First-order entropy change: -A r [p_a (ln p_a + H) - sum p^2 (ln p + H)], with r = 1.
    advantage = ADVANTAGE.double()[batch.sequence_of_token()]
    baseline = (prob**2 * (logprobs + entropy[:, None])).sum(1)
    change = -advantage * (taken.exp() * (taken + entropy) - baseline)
    assert (scores.entropy_change - change).abs().max() < 1e-6


@pytest.mark.parametrize("aggregation", ["token-mean", "sequence-mean"])
def test_two_updates_have_the_exact_loss_and_gradient(policy, reference, batch: RolloutBatch, aggregation: str) -> None:
    scores = policy.score(batch, ADVANTAGE)
    everything = torch.arange(8)
    lengths = batch.response_lengths
    weight = (1.0 / lengths.sum()).expand(8) if aggregation == "token-mean" else 1.0 / (8 * lengths)
    objective = UpdateObjective(build_objective("clip"), THRESHOLDS)
    for _ in range(2):  # in the second one, ratios differ from 1 and some exceed their bounds
        export = {name: tensor.clone() for name, tensor in policy.bridge.export(policy.model_chunks)}
        reference.load_state_dict(export, strict=False)
        report = policy.update(batch, everything, ADVANTAGE, weight.float(), scores, objective)

    index = batch.sequence_of_token()
    advantage, old = ADVANTAGE.double()[index], scores.logprob.double()
    taken = _reference_logprobs(reference, batch).gather(1, _targets(batch)[:, None])[:, 0]
    ratio = (taken - old).exp()
    high = (1 + 0.5) / (1 + 0.25 * old.exp())
    low = (1 - 0.3) / (1 - 0.13 * old.exp())
    clipped = torch.minimum(torch.maximum(ratio, low), high)
    loss = -(weight.double()[index] * torch.minimum(ratio * advantage, clipped * advantage)).sum()
    loss.backward()
    outside_high, outside_low = (ratio > high) & (advantage > 0), (ratio < low) & (advantage < 0)
    assert outside_high.any() and outside_low.any() and not (outside_high | outside_low).all()

    from megatron_rlvr.training.loss import LOSS_SUMS

    sums = dict(zip(LOSS_SUMS, report.sums.tolist(), strict=True))
    assert sums["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert sums["clipped_high"] == outside_high.sum() and sums["clipped_low"] == outside_low.sum()
    norm = torch.stack([p.grad.norm() for p in reference.parameters() if p.grad is not None]).norm()
    assert report.grad_norm == pytest.approx(norm.item(), rel=1e-5)
    [model] = policy.model_chunks
    for ours, theirs in (
        (model.embedding.word_embeddings.weight, reference.model.embed_tokens.weight),
        (model.decoder.final_layernorm.weight, reference.model.norm.weight),
        (model.decoder.layers[1].mlp.linear_fc2.weight, reference.model.layers[1].mlp.down_proj.weight),
    ):
        assert (ours.main_grad - theirs.grad).norm() < 1e-5 * theirs.grad.norm()


def test_local_engine_reports_the_policy_s_own_logprobs(policy, reference) -> None:
    from megatron_rlvr.rollout.engines.local import LocalEngine

    engine = LocalEngine(policy.model_chunks, batch=5)  # too few for two prompts, so the engine makes two batches
    sampling = SamplingSettings(samples=4, max_tokens=9, temperature=TEMPERATURE, stop_token_ids=tuple(range(0, 30)))
    completions = generate(engine, PROMPTS, sampling)
    assert {c.finish_reason for c in completions} == {"stop", "length"}
    for number, completion in enumerate(completions):
        head = PROMPTS[number // 4]
        ids = completion.token_ids
        assert (ids[-1] < 30) == (completion.finish_reason == "stop") and all(t >= 30 for t in ids[:-1])
        with torch.no_grad():
            logits = reference(torch.tensor([head + ids])).logits[0, len(head) - 1 : -1]
        expected = (logits / TEMPERATURE).log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]
        assert (torch.tensor(completion.logprobs) - expected).abs().max() < 5e-6
        assert completion.kept is None
    alone = generate(LocalEngine(policy.model_chunks, batch=1000), PROMPTS[1:], sampling, first_seed=4)
    assert [c.token_ids for c in alone] == [c.token_ids for c in completions[4:]]


@pytest.mark.parametrize(("top_p", "top_k"), [(0.8, 0), (1.0, 2), (0.9, 7), (1.0, 500)])
def test_the_scoring_pass_has_the_logprobs_of_the_cut_that_the_local_engine_drew_from(policy, top_p, top_k) -> None:
    from megatron_rlvr.rollout.engines.local import LocalEngine

    engine = LocalEngine(policy.model_chunks, batch=5)
    sampling = SamplingSettings(
        samples=4, max_tokens=9, temperature=TEMPERATURE, top_p=top_p, top_k=top_k, stop_token_ids=tuple(range(30)),
        returns_kept=True,
    )  # fmt: skip
    completions = generate(engine, PROMPTS, sampling)
    batch = RolloutBatch.from_completions(PROMPTS, completions, [0.0] * 8, padding=109)
    assert batch.kept is not None and len(batch.kept) == batch.token_count
    sizes = batch.kept.offsets.diff()
    if top_p == 1.0:
        assert (sizes == min(top_k, 112)).all()
    else:
        assert 1 < sizes.float().mean() < 80
    scores = policy.score(batch, ADVANTAGE)
    assert (scores.logprob - batch.rollout_logprob).abs().max() < 5e-6
    assert (scores.entropy <= sizes.float().log() + 1e-5).all()
    without = generate(engine, PROMPTS, dataclasses.replace(sampling, returns_kept=False))
    assert [c.token_ids for c in without] == [c.token_ids for c in completions] and without[0].kept is None
