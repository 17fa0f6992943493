"""Random numbers, and the tokens drawn with them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_rlvr.rollout.sampling import draw, sample_seed, uniforms


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
    token, logprob = draw(logits.expand(count, -1), uniform, 0.7, 1.0, 0)
    expected = (logits.double() / 0.7).softmax(-1)
    observed = torch.bincount(token, minlength=7) / count
    assert observed[2] == 0
    assert (observed - expected).abs().max() < 5 * (0.25 / count) ** 0.5
    assert torch.allclose(logprob.double(), expected.log()[token], atol=1e-6)


def test_top_k_and_top_p_keep_whole_vocabulary_logprobs() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().expand(1000, -1)
    uniform = torch.linspace(0, 1, 1001, dtype=torch.float64)[:-1]
    token, logprob = draw(logits, uniform, 1.0, 1.0, 2)
    assert torch.bincount(token).tolist() == pytest.approx([625, 375], abs=1)  # the boundary may round either way
    assert logprob[0].exp().item() == pytest.approx(0.5)
    token, _ = draw(logits, uniform, 1.0, 0.8, 0)
    assert set(token.tolist()) == {0, 1}
    token, _ = draw(logits, uniform, 1.0, 0.81, 0)
    assert set(token.tolist()) == {0, 1, 2}
