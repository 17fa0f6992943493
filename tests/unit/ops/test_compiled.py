"""The choice of kernels: what `backend` reports, which fallbacks warn, and which fail."""

import os
import subprocess
import sys
import warnings

import pytest
import torch

from megatron_rlvr.ops import compiled
from tests.processes import DEADLINE_SECONDS

COMPILED = compiled.backend() != "reference"
PRINT = "import warnings; warnings.simplefilter('always'); from megatron_rlvr import ops; print(ops.backend())"


def run(program, **environment):
    return subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECONDS,
    )


def test_the_reference_does_not_warn_if_it_is_requested():
    done = run(PRINT, MEGATRON_RLVR_OPS="reference")
    assert done.stdout.strip() == "reference"
    assert "eager reference runs" not in done.stderr


@pytest.mark.skipif(not COMPILED, reason="the kernels were not built")
@pytest.mark.parametrize(("limit", "expected"), [("baseline", {"cpu"}), ("avx2", {"cpu", "cpu-avx2"})])
def test_a_narrower_instruction_set_can_be_requested(limit, expected):
    if torch.cuda.is_available():
        pytest.skip("the CUDA kernels are what is reported here")
    assert run(PRINT, MEGATRON_RLVR_CPU=limit).stdout.strip() in expected


@pytest.mark.parametrize(
    ("variable", "message"),
    [
        ("MEGATRON_RLVR_OPS", "MEGATRON_RLVR_OPS: must be 'reference' or unset, found 'fast'"),
        ("MEGATRON_RLVR_CPU", "MEGATRON_RLVR_CPU: must be one of avx512, avx2, baseline or unset, found 'fast'"),
    ],
)
def test_an_unknown_setting_is_refused(variable, message):
    assert message in run(PRINT, **{variable: "fast"}).stderr


def test_missing_kernels_are_reported_once(monkeypatch, tmp_path):
    monkeypatch.delenv("MEGATRON_RLVR_OPS", raising=False)
    monkeypatch.setattr(compiled, "_PATH", tmp_path / "_C.so")
    monkeypatch.setattr(compiled, "_announced", set())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert compiled.load_kernels() is None
        assert compiled.load_kernels() is None
    assert len(caught) == 1
    assert "the eager reference runs" in str(caught[0].message)


def test_a_library_that_does_not_load_is_an_error_not_a_fallback(monkeypatch, tmp_path):
    broken = tmp_path / "_C.so"
    broken.write_bytes(b"not a library")
    monkeypatch.delenv("MEGATRON_RLVR_OPS", raising=False)
    monkeypatch.setattr(compiled, "_PATH", broken)
    with pytest.raises(ImportError, match="does not load"):
        compiled.load_kernels()


@pytest.mark.skipif(not COMPILED, reason="the kernels were not built")
def test_a_library_from_older_sources_is_an_error_in_one_line():
    done = run(
        "from megatron_rlvr.ops.library import define; define('a_newer_operator() -> ()', eager=print, fake=print)"
    )
    assert done.returncode != 0
    error = done.stderr.splitlines()[-1]
    assert "_C.so lacks megatron_rlvr::a_newer_operator" in error
    assert "rebuild it with `pip install --no-build-isolation -e .`" in error


def test_importing_the_operators_imports_nothing_else_of_this_project():
    done = run("import sys, megatron_rlvr.ops; print([m for m in sys.modules if m.startswith('megatron')])")
    foreign = [m for m in eval(done.stdout) if not m.startswith("megatron_rlvr.ops")]
    assert foreign == ["megatron_rlvr"]
