"""Random numbers, and the tokens drawn with them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_rlvr.errors import UserError
from megatron_rlvr.rollout.config import EvaluationConfig, RolloutConfig
from megatron_rlvr.rollout.sampling import SamplingSettings, draw, sample_seed, uniforms


def _seeds(run: int, count: int) -> np.ndarray:
    return np.array([sample_seed(run, 0, i // 16, i % 16) for i in range(count)], dtype=np.uint64)


@pytest.mark.parametrize("run", range(5))
def test_uniforms_are_uniform_and_uncorrelated(run: int) -> None:
    table = np.stack([uniforms(_seeds(run, 4096), t) for t in range(8)])
    assert table.min() >= 0.0 and table.max() < 1.0
    assert abs(table.mean() - 0.5) < 4 * (1 / 12 / table.size) ** 0.5
    counts, _ = np.histogram(table, bins=64, range=(0, 1))
    assert ((counts - table.size / 64) ** 2 / (table.size / 64)).sum() < 63 + 5 * (2 * 63) ** 0.5
    correlation = np.corrcoef(table)[~np.eye(8, dtype=bool)]
    assert np.abs(correlation).max() < 5 / 4096**0.5


def test_seeds_differ_in_every_part() -> None:
    seeds = {sample_seed(r, s, p, n) for r in range(3) for s in range(3) for p in range(12) for n in range(12)}
    assert len(seeds) == 3 * 3 * 12 * 12


@pytest.mark.parametrize("seed", range(3))
def test_draw_follows_the_distribution(seed: int) -> None:
    logits = torch.randn(7, generator=torch.Generator().manual_seed(seed)) * 2
    logits[2] = -float("inf")
    count = 40_000
    uniform = torch.from_numpy(uniforms(_seeds(seed, count), 3))
    token, logprob, _ = draw(logits.expand(count, -1), uniform, 0.7, 1.0, 0)
    expected = (logits.double() / 0.7).softmax(-1)
    observed = torch.bincount(token, minlength=7) / count
    assert observed[2] == 0
    assert (observed - expected).abs().max() < 5 * (0.25 / count) ** 0.5
    assert torch.allclose(logprob.double(), expected.log()[token], atol=1e-6)


def test_top_k_and_top_p_have_the_logprobs_of_what_they_keep() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().expand(1000, -1)
    uniform = torch.linspace(0, 1, 1001, dtype=torch.float64)[:-1]
    token, logprob, kept = draw(logits, uniform, 1.0, 1.0, 2)
    assert torch.bincount(token).tolist() == pytest.approx([625, 375], abs=1)  # the boundary may round either way
    assert logprob[0].exp().item() == pytest.approx(0.625)
    assert kept is not None and kept[0].tolist() == [True, True, False, False]
    token, _, _ = draw(logits, uniform, 1.0, 0.8, 0)
    assert set(token.tolist()) == {0, 1}
    token, _, _ = draw(logits, uniform, 1.0, 0.81, 0)
    assert set(token.tolist()) == {0, 1, 2}


def _kept_by_definition(logits: torch.Tensor, temperature: float, top_p: float, top_k: int) -> list[int]:
    """What SGLang keeps, in float64: the temperature first, then both cuts of the whole distribution."""
    probability = (logits.double() / temperature).softmax(-1).tolist()
    order = sorted(range(len(probability)), key=lambda i: (-probability[i], i))
    kept, before = [], 0.0
    for rank, token in enumerate(order):
        if before < top_p and (not top_k or rank < top_k) and probability[token] > 0:
            kept.append(token)
        before += probability[token]
    return sorted(kept)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("top_p", "top_k"), [(0.803, 0), (1.0, 2), (0.603, 5), (0.99, 50), (1e-9, 0), (0.903, 1000)])
def test_the_cut_is_that_of_the_definition(seed: int, top_p: float, top_k: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(20, 200, generator=generator) * 2
    logits[3] = 1.0  # all equal: the lower ids come first
    logits[4, 50:] = -torch.inf
    _, logprob, kept = draw(logits, torch.rand(20, dtype=torch.float64, generator=generator), 0.7, top_p, top_k)
    assert kept is not None
    for row, mask in zip(logits, kept, strict=True):
        assert mask.nonzero()[:, 0].tolist() == _kept_by_definition(row, 0.7, top_p, top_k)
    token, logprob, _ = draw(logits, torch.full((20,), 0.3, dtype=torch.float64), 0.7, top_p, top_k)
    expected = (logits.double() / 0.7).masked_fill(~kept, -torch.inf).log_softmax(-1)
    assert (logprob - expected.gather(1, token[:, None])[:, 0]).abs().max() < 1e-6


def test_top_k_and_top_p_cut_the_same_distribution() -> None:
    """Top-p does not see a distribution that top-k has renormalised: .4 + .3 of the whole is less than .75 of it."""
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    _, _, kept = draw(logits, torch.zeros(1, dtype=torch.float64), 1.0, 0.75, 3)
    assert kept is not None and kept[0].tolist() == [True, True, True, False]


def test_nothing_is_cut_by_default() -> None:
    _, _, kept = draw(torch.zeros(1, 9), torch.zeros(1, dtype=torch.float64), 1.0, 1.0, 9)
    assert kept is None
    config = RolloutConfig()
    assert not SamplingSettings.for_training(config, []).returns_kept
    for config in (RolloutConfig(top_p=0.9), RolloutConfig(top_k=5)):
        assert SamplingSettings.for_training(config, []).returns_kept
        assert not SamplingSettings.for_evaluation(EvaluationConfig(top_p=0.9), config, []).returns_kept


def test_one_kept_token_trains_nothing() -> None:
    with pytest.raises(UserError, match=r"rollout\.top_k=1 always draws the most probable token"):
        RolloutConfig(top_k=1).check()
