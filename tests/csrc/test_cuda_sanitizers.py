"""The stand-alone driver under sanitizers and in several thread orders; and bugs planted on purpose, each of which
some check must find, or the check is worth nothing."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import emulator_build as building
import pytest

from tests.processes import DEADLINE_SECONDS

CHECKS = {
    "plain": ["-O0"],
    "address, undefined": ["-O0", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-O0", "-g1", "-fsanitize=thread"],
}


@dataclass(frozen=True)
class Bug:
    """``found`` in ``file`` becomes ``planted``; the driver under ``check`` must then say ``complaint``."""

    name: str
    file: str
    found: str
    planted: str
    check: str
    complaint: str


BUGS = [
    Bug(
        "reads past the end of a row",
        "cuda/memory.cuh",
        "span.tail = int(end - span.tail_begin);",
        "span.tail = int(end - span.tail_begin) + 1;",
        "address, undefined",
        "heap-buffer-overflow",
    ),
    Bug(
        "shared memory too small",
        "cuda/reductions.cuh",
        "__shared__ RowSums<float> of_warp[kMaximumThreads / kWarpSize];",
        "__shared__ RowSums<float> of_warp[1];",
        "address, undefined",
        "runtime error",
    ),
    Bug(
        "no barrier between the warps of a block",
        "cuda/reductions.cuh",
        "if (lane == 0) of_warp[warp] = sums;\n  __syncthreads();",
        "if (lane == 0) of_warp[warp] = sums;",
        "thread",
        "data race",
    ),
    Bug(
        "two threads write one vector",
        "cuda/logits_gradient.cuh",
        "for (int first = thread; first < span.vectors; first += threads * vectors_per_tile) {",
        "for (int first = thread / 2; first < span.vectors; first += threads * vectors_per_tile / 2) {",
        "thread",
        "data race",
    ),
    Bug(
        "counts added without an atomic",
        "cuda/reductions.cuh",
        "if (sum != 0) atomicAdd(reinterpret_cast<unsigned long long*>(totals) + threadIdx.x, sum);",
        "if (sum != 0) totals[threadIdx.x] += int64_t(sum);",
        "thread",
        "data race",
    ),
    Bug(
        "a barrier that one warp alone reaches",
        "cuda/reductions.cuh",
        "if (lane == 0) of_warp[warp] = sums;\n  __syncthreads();",
        "if (lane == 0) of_warp[warp] = sums;\n  if (warp == 0) __syncthreads();",
        "plain",
        "simt: deadlock: some threads never reach __syncthreads()",
    ),
    Bug(
        "a shuffle that half a warp reaches",
        "cuda/reductions.cuh",
        "sums.exponential_x = warp_sum(sums.exponential_x);",
        "if (threadIdx.x % 32 < 16) sums.exponential_x = warp_sum(sums.exponential_x);",
        "plain",
        "simt: deadlock: some lanes never reach a shuffle",
    ),
    Bug(
        "16-byte loads from wherever a row starts",
        "cuda/memory.cuh",
        "span.head = to_boundary < end - begin ? to_boundary : int(end - begin);",
        "span.head = 0 * to_boundary;",
        "plain",
        "simt: misaligned access",
    ),
    Bug(
        "the maximum's own term forgotten in a merge",
        "formulas.h",
        "const Real exponential = own + sums.excess;\n  sums.maximum",
        "const Real exponential = sums.excess;\n  sums.maximum",
        "plain",
        "check failed: log-prob",
    ),
    Bug(
        "0 times -inf",
        "formulas.h",
        "return x > kLowestExponent ? x : Real(kLowestExponent);",
        "return x;",
        "plain",
        "check failed: entropy",
    ),
    Bug(
        "a NaN that the maximum swallows",
        "cuda/online_statistics.cuh",
        "fast_exp2(y);\n    if",
        "fast_exp2(clamped_exponent(y));\n    if",
        "plain",
        "check failed: bad row reported",
    ),
    Bug(
        "logits read twice",
        "cuda/logits_gradient.cuh",
        "float values[per_vector];\n",
        "float values[per_vector];\n      words[i] = load_coherent(vectors + index);\n",
        "plain",
        "check failed: bytes per logit",
    ),
    Bug(
        "zeros over a kept logit's gradient",
        "cuda/kept_gradient.cuh",
        "if (!(kept >> j & 1u)) store",
        "store",
        "plain",
        "check failed: gradient in kept sets",
    ),
    Bug(
        "zeros before all kept logits are marked",
        "cuda/kept_gradient.cuh",
        "  __syncthreads();\n  write_zeros_between",
        "  write_zeros_between",
        "thread",
        "data race",
    ),
    Bug(
        "a gate that ignores the sign of the advantage",
        "formulas.h",
        "if (advantage > 0.0f && ratio > bounds.high)",
        "if (ratio > bounds.high)",
        "plain",
        "check failed: objective",
    ),
]


def run(program: Path, order: int = 0) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"TSAN_OPTIONS": "exitcode=66 halt_on_error=1", "ASAN_OPTIONS": "detect_leaks=0"}
    return subprocess.run(
        [program, str(order)], capture_output=True, text=True, timeout=DEADLINE_SECONDS, env=environment
    )


def plant(bug: Bug, directory: Path) -> Path:
    """A copy of csrc with the bug in it."""
    sources = directory / re.sub(r"\W+", "_", bug.name)
    shutil.copytree(building.SOURCES, sources, ignore=shutil.ignore_patterns("cpu", "bench"))
    file = sources / bug.file
    text = file.read_text()
    assert text.count(bug.found) == 1, f"{bug.file} no longer has, exactly once, the line that this bug changes"
    file.write_text(text.replace(bug.found, bug.planted))
    return sources


@pytest.fixture(scope="module")
def programs(compiled: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Future[Path]]:
    """All drivers, compiled two at a time."""
    directory = tmp_path_factory.mktemp("planted")
    pool = ThreadPoolExecutor(2)
    futures = {name: pool.submit(building.build_driver, flags) for name, flags in CHECKS.items()}
    for bug in BUGS:
        futures[bug.name] = pool.submit(building.build_driver, CHECKS[bug.check], plant(bug, directory))
    return futures


@pytest.mark.parametrize("check", CHECKS)
def test_every_check_holds_in_every_thread_order(programs: dict[str, Future[Path]], check: str) -> None:
    outputs = set()
    for order in (0, 1, 2, 3) if check == "plain" else (0, 3):
        result = run(programs[check].result(), order)
        assert result.returncode == 0, result.stdout + result.stderr
        assert "all checks hold" in result.stdout
        outputs.add(result.stdout)
    assert len(outputs) == 1, "results depend on the order of threads"


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_planted_bug_is_found(programs: dict[str, Future[Path]], bug: Bug) -> None:
    result = run(programs[bug.name].result())
    assert result.returncode != 0, "nothing noticed the bug"
    assert bug.complaint in result.stdout + result.stderr, result.stdout + result.stderr
