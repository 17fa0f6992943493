"""A build without its tools reports which one to install, before it compiles anything."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import DEADLINE_SECONDS

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"CXX": "no-such-compiler"}, "no no-such-compiler found to compile the operators with; install one"),
        (
            {"MEGATRON_RLVR_CUDA": "1", "CUDA_HOME": "/nowhere"},
            "MEGATRON_RLVR_CUDA=1, but no nvcc found; install the CUDA",
        ),
        ({"MEGATRON_RLVR_CUDA": "2"}, "MEGATRON_RLVR_CUDA must be 0, 1 or unset, found '2'"),
    ],
)
def test_a_missing_build_tool_is_named(environment, message, tmp_path):
    tools = tmp_path / "bin"  # a machine with a C++ compiler, CMake and Ninja, and nothing else
    tools.mkdir()
    for name in ("c++", "cmake", "ninja"):
        (tools / name).write_text("#!/bin/sh\nexit 1\n")
        (tools / name).chmod(0o755)
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("MEGATRON_RLVR", "CUDA", "CXX"))}
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(tmp_path), "--build-temp", str(tmp_path)],
        env=clean | {"PATH": str(tools)} | environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECONDS,
    )
    assert done.returncode != 0
    assert message in done.stderr.splitlines()[-1]
