"""Row statistics and their combination from the CUDA kernels, compared with float64."""

from __future__ import annotations

import pytest
import torch
from emulated import IGNORED, NO_BAD_ROW, Kernels, exact_statistics
from torch import Tensor

TYPES = [torch.float32, torch.bfloat16, torch.float16]
SMALLEST_FLOAT32_STEP = 2.0**-24  # half a unit in the last place of 1, the rounding error of a result


def random_logits(rows: int, vocabulary: int, dtype: torch.dtype, scale: float, seed: int, gap: int = 0) -> Tensor:
    """Logits in a view that starts ``gap`` elements into its buffer, with ``gap`` NaN between rows."""
    generator = torch.Generator().manual_seed(seed)
    buffer = torch.full((rows * (vocabulary + gap) + gap,), torch.nan, dtype=dtype)
    logits = buffer.as_strided((rows, vocabulary), (vocabulary + gap, 1), gap)
    logits.copy_((torch.randn(rows, vocabulary, generator=generator) * scale).to(dtype))
    return logits


def random_targets(rows: int, vocabulary: int, seed: int) -> Tensor:
    return torch.randint(0, vocabulary, (rows,), generator=torch.Generator().manual_seed(seed + 1))


def assert_exact(kernels: Kernels, logits: Tensor, targets: Tensor, temperature: float = 1.0, **options) -> None:
    found = kernels.statistics(logits, targets, temperature=temperature, second_moments=True, **options)
    logprob, entropy, moments = exact_statistics(logits, targets, temperature)
    finite = logprob > -torch.inf
    assert torch.equal(found.logprob[~finite].double(), logprob[~finite])
    error = (found.logprob.double() - logprob).abs()[finite]
    assert (error <= 2e-6 + SMALLEST_FLOAT32_STEP * logprob.abs()[finite]).all(), (
        f"log-prob is off by {error.max():.2e}"
    )
    error = (found.entropy.double() - entropy).abs()
    assert (error <= 1e-5).all(), f"entropy is off by {error.max():.2e}"
    assert found.moments is not None
    torch.testing.assert_close(found.moments.double(), moments, rtol=2e-5, atol=1e-12)
    assert found.bad_rows == [NO_BAD_ROW, NO_BAD_ROW]


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("scale", [1.0, 6.0, 100.0])
@pytest.mark.parametrize(("rows", "vocabulary", "gap"), [(3, 1, 0), (4, 31, 1), (3, 1000, 3), (2, 4099, 5)])
def test_any_shape_scale_and_alignment(
    kernels: Kernels, dtype: torch.dtype, scale: float, rows: int, vocabulary: int, gap: int
) -> None:
    for seed in range(3):
        logits = random_logits(rows, vocabulary, dtype, scale, seed, gap)
        assert_exact(kernels, logits, random_targets(rows, vocabulary, seed), temperature=(1.0, 0.7, 1.5)[seed])


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("scale", [0.01, 3.0, 100.0])
@pytest.mark.parametrize("multiprocessors", [1, 8])
def test_256k_vocabulary(kernels: Kernels, dtype: torch.dtype, scale: float, multiprocessors: int) -> None:
    logits = random_logits(2, 262144, dtype, scale, seed=3, gap=1)
    slices = kernels.module.statistics_launch(2, 262144, multiprocessors)[1]
    assert (slices > 1) == (multiprocessors > 1)
    assert_exact(kernels, logits, random_targets(2, 262144, 3), multiprocessors=multiprocessors)


def test_equal_logits_do_not_drift(kernels: Kernels) -> None:
    """Equal terms round the same way each time, so that errors would add up instead of cancelling."""
    logits = torch.full((1, 262144), 0.3)
    logits[0, 7] = 1.1
    assert_exact(kernels, logits, torch.tensor([7]))


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_minus_infinity(kernels: Kernels, dtype: torch.dtype) -> None:
    logits = random_logits(5, 2000, dtype, 4.0, seed=0)
    targets = random_targets(5, 2000, 0)
    logits[0, ::2] = -torch.inf
    targets[0] = 1
    logits[1, :1999] = -torch.inf  # a row with one choice
    targets[1] = 1999
    logits[2, 17] = -torch.inf  # a target with probability 0
    targets[2] = 17
    logits[3, :1000] = -torch.inf  # a whole shard at 2 and 4 shards
    targets[3] = 1500
    for shards in (1, 2, 4):
        assert_exact(kernels, logits, targets, shards=shards)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("second_moments", [False, True])
def test_shards_agree_and_targets_at_their_edges_are_found(
    kernels: Kernels, dtype: torch.dtype, second_moments: bool
) -> None:
    vocabulary = 8 * 301
    edges = [edge + side for edge in range(0, vocabulary + 1, 301) for side in (-1, 0)][1:-1]
    targets = torch.tensor([*edges, 0, vocabulary - 1])
    logits = random_logits(len(targets), vocabulary, dtype, 5.0, seed=2, gap=1)
    whole = kernels.statistics(logits, targets, second_moments=second_moments)
    logprob, _, _ = exact_statistics(logits, targets)
    assert ((whole.logprob.double() - logprob).abs() <= 2e-6 + SMALLEST_FLOAT32_STEP * logprob.abs()).all()
    for shards in (2, 4, 8):
        parts = kernels.statistics(logits, targets, shards=shards, second_moments=second_moments)
        step = 2 * SMALLEST_FLOAT32_STEP * whole.logprob.abs()
        assert ((parts.logprob - whole.logprob).abs() <= 1e-6 + step).all()
        torch.testing.assert_close(parts.entropy, whole.entropy, rtol=0, atol=1e-6)
        if second_moments:
            torch.testing.assert_close(parts.moments, whole.moments, rtol=2e-6, atol=1e-9)


def test_almost_certain_tokens_keep_their_digits(kernels: Kernels) -> None:
    """1 - p of 1e-3 to 1e-9: log-prob and entropy are right to five digits, not to 1e-7 absolute."""
    logits = torch.full((4, 5000), -12.0)
    logits[:, 3] = torch.tensor([3.5, 8.0, 12.0, 17.0])
    targets = torch.full((4,), 3)
    found = kernels.statistics(logits, targets)
    logprob, entropy, _ = exact_statistics(logits, targets)
    scaled = logits.double() - logits.double().max(-1, keepdim=True).values
    others = scaled.exp()[:, torch.arange(5000) != 3].sum(-1)
    torch.testing.assert_close(found.logprob.double(), -torch.log1p(others), rtol=2e-6, atol=0)
    torch.testing.assert_close(found.entropy.double(), entropy, rtol=1e-5, atol=1e-12)
    assert (logprob < 0).all()


def test_ignored_targets(kernels: Kernels) -> None:
    logits = random_logits(4, 999, torch.float32, 3.0, seed=5)
    targets = random_targets(4, 999, 5)
    targets[1] = targets[3] = IGNORED
    assert_exact(kernels, logits, targets)
    assert kernels.statistics(logits, targets).logprob[[1, 3]].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, "all -inf"])
@pytest.mark.parametrize("column", [0, 500, 1003])
def test_rows_that_are_no_distribution_are_reported(kernels: Kernels, poison: float | str, column: int) -> None:
    logits = random_logits(6, 1004, torch.bfloat16, 3.0, seed=6, gap=1)
    targets = random_targets(6, 1004, 6)
    clean = kernels.statistics(logits, targets)
    for row in (2, 4):
        if poison == "all -inf":
            logits[row] = -torch.inf
        else:
            logits[row, column] = poison
    for shards in (1, 4):
        found = kernels.statistics(logits, targets, shards=shards)
        assert found.bad_rows == [2, NO_BAD_ROW]
        assert (
            found.logprob.isnan().tolist() == found.entropy.isnan().tolist() == [False, False, True, False, True, False]
        )
        good = torch.tensor([0, 1, 3, 5])
        torch.testing.assert_close(found.logprob[good], clean.logprob[good], rtol=0, atol=2e-6)


@pytest.mark.parametrize("target", [1004, 2**40, -1, -101])
def test_targets_that_do_not_exist_are_reported(kernels: Kernels, target: int) -> None:
    logits = random_logits(6, 1004, torch.float32, 3.0, seed=6)
    targets = random_targets(6, 1004, 6)
    targets[3] = target
    assert kernels.statistics(logits, targets, shards=2).bad_rows == [NO_BAD_ROW, 3]


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_thread_order_changes_no_bit(kernels: Kernels, order: int) -> None:
    logits = random_logits(3, 40001, torch.bfloat16, 3.0, seed=7, gap=3)
    targets = random_targets(3, 40001, 7)
    expected = kernels.statistics(logits, targets, second_moments=True, multiprocessors=4)
    kernels.set_order(order)
    found = kernels.statistics(logits, targets, second_moments=True, multiprocessors=4)
    assert torch.equal(found.state, expected.state)
    assert torch.equal(found.moments, expected.moments)


@pytest.mark.parametrize("second_moments", [False, True])
def test_layout_is_that_of_the_eager_reference(kernels: Kernels, second_moments: bool) -> None:
    from megatron_rlvr.ops import reference

    logits = random_logits(5, 777, torch.bfloat16, 3.0, seed=8, gap=1)
    targets = random_targets(5, 1554, 8)
    targets[0] = IGNORED
    for start in (0, 777):
        found = kernels.partials(
            logits, targets, vocabulary_start=start, temperature=1 / 1.25, second_moments=second_moments
        )
        expected = reference.row_statistics(logits, targets, start, 1554, 1.25, second_moments)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_columns_of_the_row_state_are_those_of_the_eager_reference(kernels: Kernels) -> None:
    from megatron_rlvr.ops import reference

    logits = random_logits(5, 777, torch.bfloat16, 3.0, seed=8, gap=1)
    found = kernels.statistics(logits, random_targets(5, 777, 8), temperature=0.8)
    maximum = logits.float().max(-1).values
    assert torch.equal(found.state[:, reference.STATE_MAXIMUM], maximum)
    assert torch.equal(found.state[:, reference.STATE_ENTROPY], found.entropy)
    assert torch.equal(found.state[:, reference.STATE_LOGPROB], found.logprob)
    log_sum = torch.logsumexp((logits.double() - maximum.double().unsqueeze(-1)) / 0.8, -1)
    torch.testing.assert_close(found.state[:, reference.STATE_LOG_SUM].double(), log_sum, rtol=1e-6, atol=0)


def test_zero_rows_succeed_without_a_launch(kernels: Kernels) -> None:
    empty = torch.empty(0, 100)
    assert kernels.statistics(empty, torch.empty(0, dtype=torch.int64)).logprob.shape == (0,)
