"""The choices of the launch heuristics, and the memory traffic of the kernels, counted by the emulator."""

from __future__ import annotations

import re

import pytest
import torch
from emulated import Kernels
from emulator_build import SOURCES
from test_cuda_statistics import random_logits, random_targets

SHAPES = [(1, 1), (1, 100), (1, 4096), (1, 262144), (7, 151936), (100, 16), (4096, 18992), (65536, 151936), (300, 1)]


@pytest.mark.parametrize("multiprocessors", [1, 108, 132, 148])
@pytest.mark.parametrize(("rows", "width"), SHAPES)
@pytest.mark.parametrize("kind", ["statistics", "gradient"])
def test_slices_cover_a_row_and_fit_a_launch(
    kernels: Kernels, kind: str, rows: int, width: int, multiprocessors: int
) -> None:
    threads, slices, slice_width = getattr(kernels.module, f"{kind}_launch")(rows, width, multiprocessors)
    assert threads in (32, 64, 128, 256, 512)
    assert (slices - 1) * slice_width < width <= slices * slice_width
    assert rows * slices < 2**31
    if slices > 1:
        assert slice_width % 4096 == 0  # keeps every slice aligned as its row is


def test_few_long_rows_fill_the_device_and_many_are_not_cut(kernels: Kernels) -> None:
    launch = kernels.module.statistics_launch
    assert launch(4096, 151936, 132)[:2] == (512, 1)
    assert launch(4096, 18992, 132)[:2] == (128, 1)  # bf16: 512 bytes per thread
    threads, slices, _ = launch(16, 151936, 132)
    assert 16 * slices >= 132 and threads == 512
    assert launch(1, 8192, 132)[1] == 1  # too short to be worth a second kernel


@pytest.mark.parametrize(("dtype", "floor"), [(torch.bfloat16, 6), (torch.float16, 6), (torch.float32, 12)], ids=str)
@pytest.mark.parametrize(("rows", "vocabulary", "gap"), [(3, 32768, 0), (2, 18993, 3), (1, 151936, 0)])
@pytest.mark.parametrize("multiprocessors", [1, 132])
def test_bytes_per_logit(
    kernels: Kernels, dtype: torch.dtype, floor: int, rows: int, vocabulary: int, gap: int, multiprocessors: int
) -> None:
    """The floor: one read for statistics, one read and one write for the gradient. Row scalars add under 0.1 bytes."""
    logits = random_logits(rows, vocabulary, dtype, 3.0, seed=0, gap=gap)
    targets = random_targets(rows, vocabulary, 0)
    gradient = torch.ones(rows)
    kernels.reset_traffic()
    state = kernels.statistics(logits, targets, multiprocessors=multiprocessors).state
    forward = sum(kernels.traffic())
    kernels.gradient(logits, targets, state, gradient, gradient, out=logits, multiprocessors=multiprocessors)
    total = sum(kernels.traffic())
    count = rows * vocabulary
    print(f"{dtype} [{rows}, {vocabulary}]: {forward / count:.4f} forward + {(total - forward) / count:.4f} backward")
    assert floor / 3 <= forward / count <= floor / 3 + 0.05
    assert floor <= total / count <= floor + 0.1


def test_bytes_per_token_of_the_objective(kernels: Kernels) -> None:
    """Reads log-prob, old log-prob, advantage, weight, entropy and mask once, writes objective and gradient once."""
    count = 4096
    values = torch.full((count,), -1.0)
    mask = torch.ones(count, dtype=torch.bool)
    kernels.reset_traffic()
    kernels.objective(values, values, values, (0.2, 0.0, 0.2, 0.0), mask=mask, weight=values, entropy=values)
    loaded, stored = kernels.traffic()
    assert count * 21 <= loaded <= count * 21.1
    assert count * 8 <= stored <= count * 8.1


def test_nothing_waits_for_the_host_or_allocates() -> None:
    """The sources contain nothing that would break the capture of a CUDA graph or escape the counting of bytes."""
    sources = [path for path in (SOURCES / "cuda").iterdir() if path.suffix in (".cu", ".cuh")]
    assert len(sources) > 10
    for path in sources:
        text = re.sub(r"//.*", "", path.read_text())
        assert not re.search(
            r"cuda\w*(Synchronize|Malloc|Free|Memcpy|Memset)|\bmalloc\(|\bnew\b|printf|\bassert\(", text
        ), path
        if path.name != "memory.cuh":
            assert not re.search(r"\b__(ld|st)[a-z]+\(|\*\s*reinterpret_cast", text), (
                f"{path}: memory access outside memory.cuh"
            )
