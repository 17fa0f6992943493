"""nvcc compiles the kernels for every supported architecture: quickly, without spills or warnings."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from emulator_build import SOURCES, kernel_sources

from tests.processes import DEADLINE_SECONDS

ARCHITECTURES = ["sm_80", "sm_90", "sm_100"]
SECONDS_OF_COMPILATION = 60  # processor time for all files and architectures together
MOST_REGISTERS = 64  # so that a multiprocessor can run two blocks of 512 threads


@dataclass(frozen=True)
class Kernel:
    name: str
    architecture: str
    registers: int
    stack_bytes: int
    spilled_bytes: int
    shared_bytes: int


def find_nvcc() -> str:
    home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin" / "nvcc"
    nvcc = shutil.which("nvcc") or (str(home) if home.exists() else None)
    if nvcc is None:
        pytest.skip("no nvcc on PATH nor under CUDA_HOME: registers and spills cannot be known without it")
    return nvcc


def parsed(ptxas: str) -> list[Kernel]:
    """The figures that ``-Xptxas -v`` prints for each kernel."""
    pattern = re.compile(
        r"Compiling entry function '(?P<name>\w+)' for '(?P<architecture>\w+)'.*?"
        r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
        r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
        re.DOTALL,
    )
    kernels = []
    for match in pattern.finditer(ptxas):
        shared = re.search(r"(\d+) bytes smem", match["rest"])
        kernels.append(
            Kernel(
                readable(match["name"]),
                match["architecture"],
                int(match["registers"]),
                int(match["stack"]),
                int(match["stores"]) + int(match["loads"]),
                int(shared[1]) if shared else 0,
            )
        )
    return kernels


def readable(mangled: str) -> str:
    """The kernel's name and template arguments, from its mangled name."""
    name = re.search(r"\d+([a-z_]+?_kernel)", mangled)
    assert name is not None, f"unexpected kernel {mangled}"
    arguments = [
        text for code, text in (("I13__nv_bfloat16", "bf16"), ("I6__half", "fp16"), ("If", "fp32")) if code in mangled
    ]
    arguments += ["second moments"] if "Lb1" in mangled else []
    return f"{name[1].removesuffix('_kernel')} {', '.join(arguments)}".strip()


@pytest.fixture(scope="module")
def compilation(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Kernel], float]:
    """All kernels, and the processor seconds that compiling them took."""
    nvcc, directory = find_nvcc(), tmp_path_factory.mktemp("nvcc")
    targets = [f"-gencode=arch=compute_{a[3:]},code={a}" for a in ARCHITECTURES]

    def compile_one(source: Path) -> str:
        flags = ["-std=c++17", "-O3", "-Xptxas", "-v", "-Werror", "all-warnings", *targets]
        command = [nvcc, *flags, "-I", SOURCES, "-c", source, "-o", directory / f"{source.name}.o"]
        result = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_SECONDS)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stderr

    before = os.times()
    with ThreadPoolExecutor(2) as pool:
        outputs = list(pool.map(compile_one, kernel_sources()))
    after = os.times()
    seconds = after.children_user + after.children_system - before.children_user - before.children_system
    return [kernel for output in outputs for kernel in parsed(output)], seconds


def test_every_kernel_is_compiled_for_every_architecture(compilation: tuple[list[Kernel], float]) -> None:
    kernels, _ = compilation
    by_architecture = {a: {k.name for k in kernels if k.architecture == a} for a in ARCHITECTURES}
    assert len(by_architecture["sm_80"]) == 6 + 3 + 2 + 2 + 1 + 6 + 3
    # statistics, gradient, merge, combine, objective, and under kept sets: statistics, gradient
    assert by_architecture["sm_80"] == by_architecture["sm_90"] == by_architecture["sm_100"]


def test_no_spills_and_few_registers(compilation: tuple[list[Kernel], float]) -> None:
    kernels, _ = compilation
    for name in sorted({k.name for k in kernels}):
        of_name = {k.architecture: k for k in kernels if k.name == name}
        shared = of_name["sm_90"].shared_bytes
        print(f"| {name} | {' | '.join(str(of_name[a].registers) for a in ARCHITECTURES)} | {shared} |")
    spilling = [k for k in kernels if k.spilled_bytes or k.stack_bytes]
    assert not spilling
    assert max(k.registers for k in kernels) <= MOST_REGISTERS


def test_compilation_is_quick(compilation: tuple[list[Kernel], float]) -> None:
    _, seconds = compilation
    print(f"{seconds:.1f} s of processor time")
    assert seconds < SECONDS_OF_COMPILATION


def test_the_benchmark_compiles(tmp_path: Path) -> None:
    flags = ["-std=c++17", "-arch=sm_90", "-Werror", "all-warnings", "-I", SOURCES]
    command = [find_nvcc(), *flags, "-c", SOURCES / "cuda" / "bench" / "benchmark.cu", "-o", tmp_path / "benchmark.o"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_SECONDS)
    assert result.returncode == 0, result.stdout + result.stderr
