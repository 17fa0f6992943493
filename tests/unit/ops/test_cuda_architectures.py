"""The GPUs that the CUDA kernels are compiled for are those that the installed nvcc knows."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.processes import DEADLINE_SECONDS, ROOT

SCRIPT = """
include({root}/csrc/cuda/architectures.cmake)
choose_cuda_architectures("{nvcc}" chosen)
message(STATUS "chosen=[${{chosen}}]")
"""


def choose(folder: Path, nvcc: str) -> subprocess.CompletedProcess[str]:
    """Run the choice in CMake, with a program `nvcc` that is this shell script."""
    program, script = folder / "nvcc", folder / "choose.cmake"
    program.write_text(f"#!/bin/sh\n{nvcc}\n")
    program.chmod(0o755)
    script.write_text(SCRIPT.format(root=ROOT, nvcc=program))
    cmake = shutil.which("cmake") or pytest.skip("no cmake")
    return subprocess.run([cmake, "-P", str(script)], capture_output=True, text=True, timeout=DEADLINE_SECONDS)


@pytest.mark.parametrize(
    ("offered", "chosen"),
    [
        ("70 75 80 86 87 88 89 90 100 103 110 120 121", "80-real;90-real;100"),  # 13.0
        ("50 52 53 60 61 62 70 72 75 80 86 87 89 90 100 101 120", "80-real;90-real;100"),  # 12.8
        ("50 52 53 60 61 62 70 72 75 80 86 87 89 90", "80-real;90"),  # 12.4
        ("35 50 60 70 75 80 86", "80"),  # 11.4
        ("90 100f 100a", "90"),
    ],
)
def test_the_newest_that_nvcc_knows_is_embedded_as_ptx(tmp_path: Path, offered: str, chosen: str) -> None:
    lines = " ".join(f"compute_{name}" for name in offered.split())
    done = choose(tmp_path, f'[ "$1" = --list-gpu-arch ] && printf "%s\\n" {lines}')
    assert done.returncode == 0, done.stderr
    assert f"chosen=[{chosen}]" in done.stdout
    missing = {"80", "90", "100"} - set(offered.split())
    assert set(re.findall(r"compute_(\d+)", done.stderr)) == missing


@pytest.mark.parametrize(
    ("nvcc", "message"),
    [
        ("echo compute_70; echo compute_75", "compiles for none of compute_80"),
        ("echo 'unknown option' >&2; exit 1", "--list-gpu-arch` failed"),
    ],
)
def test_an_nvcc_that_cannot_compile_the_kernels_is_refused(tmp_path: Path, nvcc: str, message: str) -> None:
    done = choose(tmp_path, nvcc)
    assert done.returncode != 0
    assert message in " ".join(done.stderr.split())
