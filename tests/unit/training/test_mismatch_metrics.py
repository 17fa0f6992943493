"""The measurements of a mismatch, against their formulas in plain float64 Python."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator

import pytest
import torch

from megatron_rlvr.data.batch import RolloutBatch
from megatron_rlvr.data.completion import Completion
from megatron_rlvr.megatron import parallel
from megatron_rlvr.megatron.config import ParallelConfig
from megatron_rlvr.objectives.importance import Corrected
from megatron_rlvr.training.head import TokenScores
from megatron_rlvr.training.mismatch_metrics import TokenMismatch, mismatch_metrics

LENGTHS = [300, 1, 20, 7, 260, 40]


@pytest.fixture(scope="module")
def layout() -> Iterator[parallel.Layout]:
    with parallel.parallel_groups(ParallelConfig(), seed=0) as layout:
        yield layout


def rollout(seed: int, spread: float) -> tuple[RolloutBatch, TokenScores]:
    generator = torch.Generator().manual_seed(seed)
    completions = [Completion([3] * n, [-1.0] * n, "stop", 0) for n in LENGTHS]
    batch = RolloutBatch.from_completions([[3, 4], [5], [6]], completions, [0.0] * 6, padding=0)
    count = batch.token_count
    scores = TokenScores.zeros(count)
    scores.logprob = -torch.rand(count, generator=generator) * 3
    scores.entropy = torch.rand(count, generator=generator)
    batch.rollout_logprob = scores.logprob - spread * torch.randn(count, generator=generator)
    batch.age = torch.randint(0, 3, (count,), generator=generator).mul(5)  # 0, 5 and 10, which counts as 8
    return batch, scores


@pytest.mark.parametrize("spread", [1e-6, 0.01, 0.5])
@pytest.mark.parametrize("seed", range(3))
def test_every_measurement_is_its_formula(seed: int, spread: float, layout: parallel.Layout) -> None:
    batch, scores = rollout(seed, spread)
    assert batch.age is not None
    masked = torch.arange(batch.token_count) % 7 == 0
    corrected = Corrected(torch.ones(batch.token_count), masked, masked.roll(1))
    metrics = mismatch_metrics(batch, TokenMismatch.of(batch, scores), corrected, layout)
    d = [a - b for a, b in zip(scores.logprob.tolist(), batch.rollout_logprob.tolist(), strict=True)]
    starts = [sum(LENGTHS[:i]) for i in range(len(LENGTHS))]
    totals = [sum(d[start : start + n]) for start, n in zip(starts, LENGTHS, strict=True)]
    position = [i for n in LENGTHS for i in range(n)]
    age = [min(a, 8) for a in batch.age.tolist()]
    k3 = [math.expm1(x) - x for x in d]

    def expect(name: str, value: float) -> None:
        # Differences of float32 log-probs are rounded, which a small spread magnifies.
        assert metrics.pop(name) == pytest.approx(value, rel=1e-6 + 1e-12 / spread**2, abs=1e-12), name

    expect("kl_rollout", statistics.fmean(k3))
    expect("mismatch/k1", statistics.fmean(-x for x in d))
    expect("mismatch/k2", statistics.fmean(x * x / 2 for x in d))
    expect("mismatch/mean", statistics.fmean(map(abs, d)))
    expect("mismatch/p99", sorted(map(abs, d))[math.ceil(0.99 * len(d)) - 1])
    expect("mismatch/max", max(map(abs, d)))
    for name, of in (("", d), ("_sequence", totals)):
        weights = [math.exp(x) for x in of]
        expect(f"mismatch/chi_square{name}", statistics.fmean(w * w for w in weights) - 1)
        expect(f"mismatch/effective_sample_size{name}", sum(weights) ** 2 / (len(of) * sum(w * w for w in weights)))
    expect("mismatch/missing_mass", -statistics.fmean(map(math.expm1, d)))
    expect("mismatch/missing_mass_standard_error", math.sqrt(sum(math.expm1(x) ** 2 for x in d)) / len(d))
    surprise = [-p - h for p, h, a in zip(scores.logprob.tolist(), scores.entropy.tolist(), age, strict=True) if a == 0]
    expect("mismatch/fresh_fraction", len(surprise) / len(d))
    expect("mismatch/surprise", statistics.fmean(surprise))
    expect("mismatch/surprise_standard_error", math.sqrt(sum(x * x for x in surprise)) / len(surprise))
    groups = {
        f"position_{lo}": [lo <= x < hi for x in position] for lo, hi in ((0, 1), (1, 16), (16, 256), (256, 4096))
    }
    groups |= {f"age_{a}": [x == a for x in age] for a in (0, 5, 8)}
    for group, members in groups.items():
        for name, values in (("mean", list(map(abs, d))), ("kl", k3)):
            expect(f"mismatch/{group}/{name}", statistics.fmean(v for v, m in zip(values, members, strict=True) if m))
        for name, flags in (("masked", corrected.masked), ("truncated", corrected.truncated)):
            chosen = [float(v) for v, m in zip(flags.tolist(), members, strict=True) if m]
            expect(f"mismatch/{group}/{name}_fraction", statistics.fmean(chosen))
    expect("mismatch/masked_fraction", float(masked.double().mean()))
    expect("mismatch/truncated_fraction", float(masked.double().mean()))
    assert metrics == {}


def test_the_weights_of_long_sequences_overflow_nothing(layout: parallel.Layout) -> None:
    batch, scores = rollout(0, 0.1)
    batch.rollout_logprob[:300] = scores.logprob[:300] + 50.0  # the product of this sequence's ratios is e^-15000
    metrics = mismatch_metrics(batch, TokenMismatch.of(batch, scores), None, layout)
    assert all(map(math.isfinite, metrics.values()))
    batch.rollout_logprob[:300] = scores.logprob[:300] - 50.0
    metrics = mismatch_metrics(batch, TokenMismatch.of(batch, scores), None, layout)
    assert all(map(math.isfinite, metrics.values()))
    assert metrics["mismatch/effective_sample_size_sequence"] == pytest.approx(1 / 6)


def test_if_all_tokens_are_of_the_current_weights_there_is_no_division_by_age(layout: parallel.Layout) -> None:
    batch, scores = rollout(1, 0.1)
    for age in (None, torch.zeros(batch.token_count, dtype=torch.int64)):
        batch.age = age
        metrics = mismatch_metrics(batch, TokenMismatch.of(batch, scores), None, layout)
        assert (
            not any("age_" in name or "masked" in name for name in metrics) and metrics["mismatch/fresh_fraction"] == 1
        )
