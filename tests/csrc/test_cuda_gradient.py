"""The gradient of log-prob and entropy with respect to the logits, from the CUDA kernel, compared with float64."""

from __future__ import annotations

import pytest
import torch
from emulated import IGNORED, Kernels, exact_gradient
from test_cuda_statistics import TYPES, random_logits, random_targets
from torch import Tensor

FLUSHED = 1e-35  # the kernel treats probabilities below 2^-126, the smallest normal float32, as 0
MANTISSA_BITS = {torch.float32: 23, torch.bfloat16: 7, torch.float16: 10}


def gradients(rows: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed + 2)
    return torch.randn(rows, generator=generator), torch.randn(rows, generator=generator)


def unit_in_last_place(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The spacing of ``dtype`` numbers at these magnitudes; that of the subnormals where the numbers are subnormal."""
    exponent = torch.frexp(values.abs().double())[1] - 1
    smallest = {torch.float32: -126, torch.bfloat16: -126, torch.float16: -14}[dtype]
    return torch.ldexp(
        torch.ones_like(values, dtype=torch.float64), exponent.clamp(min=smallest) - MANTISSA_BITS[dtype]
    )


def condition(logits: Tensor, targets: Tensor, g: Tensor, h: Tensor, temperature: float) -> Tensor:
    """The sizes of the terms that a gradient is the sum of, |g (1[i = a] - p)| + |h| p (|ln p| + H): where they cancel,
    the result cannot have more digits than they have."""
    logprob = torch.log_softmax(logits.double() / temperature, -1)
    probability = logprob.exp()
    surprise = torch.where(probability > 0, -logprob, 0.0)
    entropy = (probability * surprise).sum(-1, keepdim=True)
    from_logprob = exact_gradient(logits, targets, g, torch.zeros_like(h), temperature).abs()
    return from_logprob + h.abs().unsqueeze(-1) * probability * (surprise + entropy) / temperature


def in_place(
    kernels: Kernels, logits: Tensor, targets: Tensor, g: Tensor | None, h: Tensor | None, temperature: float = 1.0
) -> Tensor:
    state = kernels.statistics(logits, targets, temperature=temperature).state
    kernels.gradient(logits, targets, state, g, h, out=logits, temperature=temperature)
    return logits


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("scale", [1.0, 6.0, 100.0])
@pytest.mark.parametrize(("rows", "vocabulary", "gap"), [(3, 2, 0), (4, 31, 1), (3, 1000, 3), (2, 40003, 5)])
def test_any_shape_scale_and_alignment(
    kernels: Kernels, dtype: torch.dtype, scale: float, rows: int, vocabulary: int, gap: int
) -> None:
    for seed, temperature in enumerate((1.0, 0.7)):
        logits = random_logits(rows, vocabulary, dtype, scale, seed, gap)
        targets = random_targets(rows, vocabulary, seed)
        g, h = gradients(rows, seed)
        exact = exact_gradient(logits, targets, g, h, temperature)
        terms = condition(logits, targets, g, h, temperature)
        found = in_place(kernels, logits, targets, g, h, temperature).double()
        if dtype == torch.float32:
            assert ((found - exact).abs() <= 1e-5 * terms + FLUSHED).all()
            assert (found - exact).norm() <= 1e-5 * exact.norm() + 1e-30
        else:
            error = (found - exact.to(dtype).double()).abs()
            assert (error <= unit_in_last_place(exact, dtype) + 1e-5 * terms + FLUSHED).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale", [1.0, 6.0, 30.0])
def test_half_precision_is_within_one_unit_in_the_last_place(
    kernels: Kernels, dtype: torch.dtype, scale: float
) -> None:
    """In the log-prob's gradient alone nothing cancels, so no tolerance is added, even for tokens with a tiny 1 - p."""
    for seed in range(3):
        logits = random_logits(8, 3001, dtype, scale, seed)
        targets = logits.float().argmax(-1)
        logits[torch.arange(8), targets] += torch.arange(8).to(dtype) * 2
        g = gradients(8, seed)[0] * (1024 if dtype == torch.float16 else 1)  # as a loss scale does
        exact = exact_gradient(logits, targets, g, torch.zeros(8))
        found = in_place(kernels, logits, targets, g, None).double()
        error = (found - exact.to(dtype).double()).abs() / unit_in_last_place(exact, dtype)
        normal = exact.abs() > 1e-37
        assert error[normal].max() <= 1.0


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_in_place_equals_out_of_place_and_touches_nothing_else(kernels: Kernels, dtype: torch.dtype) -> None:
    rows, vocabulary, gap = 4, 3001, 3
    logits = random_logits(rows, vocabulary, dtype, 4.0, seed=1, gap=gap)
    targets, (g, h) = random_targets(rows, vocabulary, 1), gradients(rows, 1)
    state = kernels.statistics(logits, targets).state
    before = logits.clone()
    results = []
    for offset in (0, 3, 5):  # the same alignment, then others, which fall back to single stores
        buffer = torch.full((rows * (vocabulary + 7) + offset,), 77.0, dtype=dtype)
        out = buffer.as_strided((rows, vocabulary), (vocabulary + 7, 1), offset)
        kernels.gradient(logits, targets, state, g, h, out=out)
        results.append(out.clone())
        out.fill_(77.0)
        assert (buffer == 77.0).all()
    assert torch.equal(logits, before)
    kernels.gradient(logits, targets, state, g, h, out=logits)
    assert all(torch.equal(logits, result) for result in results)
    storage = torch.empty(0, dtype=dtype).set_(logits.untyped_storage())
    between = torch.ones_like(storage, dtype=torch.bool)
    between.as_strided(logits.shape, logits.stride(), logits.storage_offset()).fill_(False)
    assert storage[between].isnan().all()


def test_shards_have_the_gradient_of_the_whole(kernels: Kernels) -> None:
    vocabulary = 8 * 301
    targets = torch.tensor([0, 300, 301, 602, vocabulary - 1, 1203, IGNORED])
    logits = random_logits(len(targets), vocabulary, torch.float32, 4.0, seed=4)
    g, h = gradients(len(targets), 4)
    exact = exact_gradient(logits, targets, g, h)
    for shards in (1, 2, 4, 8):
        state = kernels.statistics(logits, targets, shards=shards).state
        out = torch.full_like(logits, torch.nan)
        width = vocabulary // shards
        for rank in range(shards):
            columns = slice(rank * width, (rank + 1) * width)
            kernels.gradient(
                logits[:, columns], targets, state, g, h, out=out[:, columns], vocabulary_start=rank * width
            )
        assert (out.double() - exact).norm() <= 1e-6 * exact.norm()


def test_one_gradient_alone(kernels: Kernels) -> None:
    logits = random_logits(3, 1001, torch.float32, 4.0, seed=9)
    targets, (g, h) = random_targets(3, 1001, 9), gradients(3, 9)
    zero = torch.zeros(3)
    for g_given, h_given in ((g, None), (None, h)):
        exact = exact_gradient(logits, targets, g if h_given is None else zero, zero if h_given is None else h)
        found = in_place(kernels, logits.clone(), targets, g_given, h_given)
        assert (found.double() - exact).norm() <= 1e-6 * exact.norm()


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_rows_without_gradient_get_zeros_and_are_not_read(kernels: Kernels, dtype: torch.dtype) -> None:
    logits = random_logits(4, 5003, dtype, 4.0, seed=9, gap=1)
    logits[1] = torch.nan  # a masked row may hold anything
    targets = random_targets(4, 5003, 9)
    targets[2] = IGNORED  # its log-prob has no gradient either
    g, h = torch.tensor([0.0, 0.0, 0.5, 0.5]), torch.zeros(4)
    state = kernels.statistics(logits, targets).state
    kernels.reset_traffic()
    kernels.gradient(logits, targets, state, g, h, out=logits)
    loaded, stored = kernels.traffic()
    assert (logits[:3] == 0).all() and (logits[3] != 0).any()
    size = logits.element_size()
    assert 5003 * size <= loaded <= 5003 * size + 4 * 100
    assert stored == 4 * 5003 * size


def test_minus_infinity_has_no_gradient(kernels: Kernels) -> None:
    logits = random_logits(2, 1000, torch.float32, 4.0, seed=3)
    logits[0, ::2] = -torch.inf
    logits[1, 17] = -torch.inf
    targets, (g, h) = torch.tensor([1, 17]), gradients(2, 3)
    impossible = logits == -torch.inf
    exact = exact_gradient(logits, targets, g, h)
    found = in_place(kernels, logits, targets, g, h)
    impossible[1, 17] = False  # the target itself: g (1 - 0)
    assert (found[impossible] == 0).all()
    assert (found.double() - exact).norm() <= 1e-6 * exact.norm()


@pytest.mark.parametrize("order", [1, 2, 3])
def test_thread_order_changes_no_bit(kernels: Kernels, order: int) -> None:
    logits = random_logits(3, 9001, torch.bfloat16, 3.0, seed=7, gap=3)
    targets, (g, h) = random_targets(3, 9001, 7), gradients(3, 7)
    expected = in_place(kernels, logits.clone(), targets, g, h)
    kernels.set_order(order)
    assert torch.equal(in_place(kernels, logits.clone(), targets, g, h), expected)
