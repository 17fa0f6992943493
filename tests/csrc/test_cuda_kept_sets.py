"""The CUDA kernels under kept sets, compared with float64 over the kept logits alone."""

from __future__ import annotations

import pytest
import torch
from emulated import Kernels, exact_gradient, exact_statistics
from test_cuda_gradient import gradients
from test_cuda_statistics import TYPES, random_logits
from torch import Tensor


def kept_sets(sizes: list[int], vocabulary: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ids and offsets of random sets of these sizes, and a target of each row."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randperm(vocabulary, generator=generator)[:size] for size in sizes]
    ids = torch.cat([row.sort().values for row in rows]).int()
    return ids, torch.tensor([0, *sizes]).cumsum(0), torch.stack([row[0] for row in rows])


def masked(logits: Tensor, ids: Tensor, offsets: Tensor) -> Tensor:
    """The logits in float64, -inf where they are not kept."""
    out = torch.full(logits.shape, -torch.inf, dtype=torch.float64)
    for row in range(len(logits)):
        kept = ids[offsets[row] : offsets[row + 1]].long()
        out[row, kept] = logits[row, kept].double()
    return out


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(
    ("sizes", "vocabulary", "gap", "shards"),
    [([1, 2, 31], 31, 1, 1), ([1, 300, 1000], 1000, 3, 1), ([5, 700, 1], 902, 0, 2), ([40003, 2], 40003, 5, 1)],
)
def test_any_size_of_set(
    kernels: Kernels, dtype: torch.dtype, sizes: list[int], vocabulary: int, gap: int, shards: int
) -> None:
    for seed, temperature in enumerate((1.0, 0.7)):
        logits = random_logits(len(sizes), vocabulary, dtype, 5.0, seed, gap)
        ids, offsets, targets = kept_sets(sizes, vocabulary, seed)
        g, h = gradients(len(sizes), seed)
        of_kept = masked(logits, ids, offsets)
        logprob, entropy, moments = exact_statistics(of_kept, targets, temperature)
        expected = exact_gradient(of_kept, targets, g, h, temperature)
        logits[of_kept == -torch.inf] = torch.nan  # must not be read
        width = vocabulary // shards
        columns = [slice(rank * width, (rank + 1) * width) for rank in range(shards)]
        partials = [
            kernels.kept_partials(
                logits[:, of_rank], targets, ids, offsets, temperature=temperature, vocabulary_start=of_rank.start
            )
            for of_rank in columns
        ]
        found = kernels.combine(torch.stack(partials), targets, vocabulary, temperature=temperature)
        torch.testing.assert_close(found.logprob.double(), logprob, rtol=1e-6, atol=2e-6)
        torch.testing.assert_close(found.entropy.double(), entropy, rtol=0, atol=1e-5)
        torch.testing.assert_close(found.moments.double(), moments, rtol=2e-5, atol=1e-9)
        for of_rank in columns:
            view = logits[:, of_rank]
            kernels.kept_gradient(
                view, targets, ids, offsets, found.state, g, h, out=view, temperature=temperature,
                vocabulary_start=of_rank.start,
            )  # fmt: skip
        tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}[dtype]
        torch.testing.assert_close(logits.double(), expected, rtol=tolerance, atol=tolerance / 10)
        assert (logits[of_kept == -torch.inf] == 0).all()


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_out_of_place_with_any_alignment(kernels: Kernels, dtype: torch.dtype) -> None:
    rows, vocabulary = 3, 3001
    logits = random_logits(rows, vocabulary, dtype, 4.0, seed=1, gap=3)
    ids, offsets, targets = kept_sets([1, 200, 3001], vocabulary, 1)
    g, h = gradients(rows, 1)
    before = logits.clone()
    state = kernels.combine(kernels.kept_partials(logits, targets, ids, offsets)[None], targets, vocabulary).state
    results = []
    for offset in (0, 3, 5):
        buffer = torch.full((rows * (vocabulary + 7) + offset,), 77.0, dtype=dtype)
        out = buffer.as_strided((rows, vocabulary), (vocabulary + 7, 1), offset)
        kernels.kept_gradient(logits, targets, ids, offsets, state, g, h, out=out)
        results.append(out.clone())
        out.fill_(77.0)
        assert (buffer == 77.0).all()
    assert torch.equal(logits, before)
    kernels.kept_gradient(logits, targets, ids, offsets, state, g, h, out=logits)
    assert all(torch.equal(logits, result) for result in results)


def test_traffic_is_a_write_per_logit_and_what_is_kept(kernels: Kernels) -> None:
    """2 bytes per bf16 logit are written once; ids and kept logits are read twice. The whole vocabulary takes 6."""
    rows, vocabulary, size = 8, 20001, 50
    logits = random_logits(rows, vocabulary, torch.bfloat16, 4.0, seed=2, gap=1)
    ids, offsets, targets = kept_sets([size] * rows, vocabulary, 2)
    g, h = gradients(rows, 2)
    kernels.reset_traffic()
    partials = kernels.kept_partials(logits, targets, ids, offsets)
    state = kernels.combine(partials[None], targets, vocabulary).state
    kernels.kept_gradient(logits, targets, ids, offsets, state, g, h, out=logits)
    loaded, stored = kernels.traffic()
    per_row = 2 * size * (4 + 2) + 700  # and the search for the row's ids, the state, the partials
    assert loaded <= rows * per_row
    assert rows * vocabulary * 2 <= stored <= rows * (vocabulary * 2 + 200)


def test_a_target_outside_its_set_gives_nan(kernels: Kernels) -> None:
    logits = random_logits(3, 100, torch.float32, 4.0, seed=2)
    ids, offsets, targets = kept_sets([5, 6, 7], 100, 2)
    targets[1] = next(i for i in range(100) if i not in ids[offsets[1] : offsets[2]])
    found = kernels.combine(kernels.kept_partials(logits, targets, ids, offsets)[None], targets, 100)
    assert found.logprob.isnan().tolist() == found.entropy.isnan().tolist() == [False, True, False]
    assert found.bad_rows[0] == 1


@pytest.mark.parametrize("order", [1, 2, 3])
def test_thread_order_changes_no_bit(kernels: Kernels, order: int) -> None:
    def run() -> Tensor:
        logits = random_logits(3, 9001, torch.bfloat16, 3.0, seed=7, gap=3)
        ids, offsets, targets = kept_sets([3, 900, 9001], 9001, 7)
        partials = kernels.kept_partials(logits, targets, ids, offsets)
        state = kernels.combine(partials[None], targets, 9001).state
        kernels.kept_gradient(logits, targets, ids, offsets, state, *gradients(3, 7), out=logits)
        return logits.clone()

    expected = run()
    kernels.set_order(order)
    assert torch.equal(run(), expected)
