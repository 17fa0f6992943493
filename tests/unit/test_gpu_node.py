"""A node whose GPUs cannot be used is refused with the reason instead of training on its CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_rlvr import gpu_node, ops
from megatron_rlvr.errors import UserError
from megatron_rlvr.gpu_node import driver_version, gpu_device_files, why_unusable
from megatron_rlvr.megatron import device, layer_spec

DEVICES = [Path("/dev/nvidia0"), Path("/dev/nvidia1")]


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_a_cpu_build_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    reason = why_unusable({}, DEVICES, "580.65.06")
    assert reason is not None and "/dev/nvidia0" in reason and "CPU build" in reason and "make setup-gpu" in reason


@pytest.mark.parametrize(
    ("cuda", "driver", "needed"), [("13.0", "535.104.05", 580), ("12.8", "470.256.02", 525), ("13.0", "575.57.08", 580)]
)
def test_a_driver_that_is_too_old(monkeypatch: pytest.MonkeyPatch, cuda: str, driver: str, needed: int) -> None:
    monkeypatch.setattr(torch.version, "cuda", cuda)
    reason = why_unusable({}, DEVICES, driver)
    assert reason is not None and f"driver {driver} is too old for its CUDA {cuda}, which needs {needed}" in reason
    assert "\n" not in reason


@pytest.mark.parametrize(("cuda", "driver"), [("13.0", "580.65.06"), ("14.2", "535.104.05"), ("12.8", "550.54.15")])
def test_any_other_reason_is_what_cuda_says(monkeypatch: pytest.MonkeyPatch, cuda: str, driver: str) -> None:
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "init", lambda: (_ for _ in ()).throw(RuntimeError("CUDA unknown error\nmore")))
    reason = why_unusable({"CUDA_VISIBLE_DEVICES": "9"}, DEVICES, driver)
    assert reason is not None and f"CUDA unknown error (CUDA {cuda}, driver {driver}, CUDA_VISIBLE_DEVICES=9)" in reason
    assert "too old" not in reason and "\n" not in reason


@pytest.mark.parametrize("hidden", ["", "-1", "NoDevFiles"])
def test_the_cpu_on_request(monkeypatch: pytest.MonkeyPatch, hidden: str) -> None:
    assert why_unusable({"CUDA_VISIBLE_DEVICES": hidden}, DEVICES, "535.104.05") is None
    assert why_unusable({}, [], None) is None


def test_only_gpus_that_this_process_may_open_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("nvidia0", "nvidia10", "nvidiactl", "nvidia-uvm", "null"):
        (tmp_path / name).touch()
    assert [path.name for path in gpu_device_files(tmp_path)] == ["nvidia0", "nvidia10"]

    def refuse(*_arguments: object) -> int:
        raise PermissionError("Operation not permitted")

    monkeypatch.setattr(gpu_node.os, "open", refuse)
    assert gpu_device_files(tmp_path) == []
    assert gpu_device_files(tmp_path / "missing") == []


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\nGCC", "535.104.05"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build  (x@y)\n", "570.86.15"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for aarch64  580.95  Release Build\n", "580.95"),
        ("GCC version:  gcc version 12.2.0\n", None),
    ],
)
def test_the_drivers_version(tmp_path: Path, text: str, version: str | None) -> None:
    (tmp_path / "version").write_text(text)
    assert driver_version(tmp_path / "version") == version
    assert driver_version(tmp_path / "missing") is None


def test_no_program_falls_back_to_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_why_unusable", lambda: "this node has GPUs, but ...")
    with pytest.raises(UserError, match="this node has GPUs"):
        device.on_gpu()


def test_training_on_a_gpu_needs_the_cuda_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    device.check_operators()  # not on a GPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla V100")
    for backend, message in (("reference", "without CUDA kernels"), ("cpu", "without CUDA kernels"), ("cuda", "V100")):
        monkeypatch.setattr(ops, "backend", lambda name=backend: name)
        with pytest.raises(UserError, match=message):
            device.check_operators()
    monkeypatch.setenv("MEGATRON_RLVR_OPS", "reference")
    device.check_operators()


def test_transformer_engine_that_does_not_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match="which is not installed: run `make setup-gpu`"):
        layer_spec.check_installed("transformer_engine")
    package = tmp_path / "transformer_engine"
    package.mkdir()
    (package / "__init__.py").write_text("raise AssertionError('version mismatch\\nmore')")
    with pytest.raises(UserError, match="which does not load: version mismatch: run"):
        layer_spec.check_installed("transformer_engine")
    (package / "__init__.py").write_text("import onnx_of_a_stranger")
    with pytest.raises(UserError, match="whose onnx_of_a_stranger is missing"):
        layer_spec.check_installed("transformer_engine")
