"""The doctor finds what would make training fail, and only that."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_rlvr import doctor
from megatron_rlvr.cluster.node_checks import software_problems
from megatron_rlvr.doctor import Finding, main, pins
from tests.processes import ROOT


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> dict[str, str | None]:
    """What seems to be installed: exactly the recipe, until a test changes it. Only packages are looked at."""
    versions: dict[str, str | None] = dict(pins("train", "gpu"))
    monkeypatch.setattr(doctor, "installed", versions.get)
    for name in ("_system", "_gpus"):
        monkeypatch.setattr(doctor, name, lambda: iter(()))
    monkeypatch.setattr(doctor, "_nccl", lambda _python: iter(()))
    monkeypatch.setattr(doctor, "_transformer_engine", lambda: Finding("Transformer Engine loads", "yes"))
    monkeypatch.setattr(doctor, "_operators", lambda _on_gpu: Finding("operators", "with CUDA"))
    return versions


def test_the_recipe_passes(recipe: dict[str, str | None], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--for", "gpu"]) == 0
    output = capsys.readouterr().out
    assert "training can start" in output and "FAILS" not in output and "not tested" not in output
    assert all(name in output for name in recipe)


@pytest.mark.parametrize(
    ("name", "version", "fails"),
    [
        ("transformer-engine", None, True),
        ("transformer-engine", "2.20.2", True),
        ("transformer-engine", "2.9.0", False),
        ("megatron-core", "0.17.0", True),
        ("torch", None, True),
        ("torch", "2.13.0+cu130", False),
        ("omegaconf", None, True),
        ("sglang", None, True),
        ("sglang", "0.5.22", False),
        ("nvidia-cuda-nvcc", None, False),  # as in NVIDIA's own containers
        ("flash-attn-4", "4.0.1", False),
    ],
)
def test_what_differs_from_the_recipe(
    recipe: dict[str, str | None], name: str, version: str | None, fails: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe[name] = version
    assert main(["--for", "gpu"]) == (2 if fails else 0)
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith(f"{name} "))
    assert (version or "missing") in row and pins("train", "gpu")[name] in row and "make setup-gpu" in row
    assert ("FAILS" if fails else "not tested") in row
    main(["--for", "gpu", "--brief"])
    assert len(capsys.readouterr().out.splitlines()) == int(fails)


def test_servers_of_another_environment_need_no_sglang_here(recipe: dict[str, str | None]) -> None:
    recipe["sglang"] = None
    assert main(["--for", "gpu"]) == 2
    assert main(["--for", "gpu", "--servers-python", "/opt/sglang/bin/python"]) == 0
    assert main(["--for", "gpu", "--servers-python", "none"]) == 0


def test_an_old_glibc_and_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.platform, "libc_ver", lambda: ("glibc", "2.28"))
    monkeypatch.setattr(doctor.shutil, "which", lambda _name: None)
    monkeypatch.delenv("CC", raising=False)
    glibc, compiler = doctor._system()
    assert glibc.fails and "examples/container" in glibc.remedy
    assert compiler.fails and "gcc" in compiler.remedy


def test_unequal_nccl_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.version.cuda", "13.0")
    monkeypatch.setattr("torch.cuda.nccl.version", lambda: (2, 30, 7))
    python = tmp_path / "python"
    for answer, fails in (
        ("echo 2.30.7", False),
        ("echo 2.28.9", True),
        ("echo ModuleNotFoundError >&2; exit 1", True),
    ):
        python.write_text(f"#!/bin/sh\n{answer}\n")
        python.chmod(0o755)
        own, theirs = doctor._nccl(str(python))
        assert not own.fails
        assert theirs.fails is fails and (not fails or "cannot form a group" in theirs.remedy)
    assert list(doctor._nccl(str(tmp_path / "missing")))[1].fails


def test_this_environment_trains_on_the_cpu() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "megatron_rlvr.doctor", "--for", "cpu"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "on CPUs: training can start" in done.stdout


@pytest.mark.skipif(doctor.installed("transformer-engine") is not None, reason="a GPU environment")
def test_the_preflight_names_what_is_missing_on_a_gpu_node() -> None:
    problems = software_problems(None)
    assert any(problem.startswith("transformer-engine: missing, wanted 2.11.0: make setup-gpu") for problem in problems)
    assert all("\n" not in problem for problem in problems)
