"""Why the GPUs of this node cannot be used, so that no program falls back to the CPU without saying so."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from megatron_rlvr.errors import first_line

DRIVER_VERSION_FILE = Path("/proc/driver/nvidia/version")
ON_THE_CPU = "set CUDA_VISIBLE_DEVICES= (empty) to run on the CPU"
_DEVICES = Path("/dev")
# The oldest driver branch that runs a major version of CUDA, from "CUDA Compatibility" in NVIDIA's documentation.
_OLDEST_DRIVER = {11: 450, 12: 525, 13: 580}
# Values of CUDA_VISIBLE_DEVICES that hide all GPUs. Slurm sets NoDevFiles in a job that requested none.
_NO_GPU = ("", "-1", "NoDevFiles")


def gpu_device_files(folder: Path = _DEVICES) -> list[Path]:
    """Return the device files of the GPUs that this process may open.

    The device cgroup of a Slurm job without GPUs shows the files of the node and refuses to open them.
    """
    return [path for path in sorted(folder.glob("nvidia[0-9]*")) if _can_be_opened(path)]


def _can_be_opened(path: Path) -> bool:
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC))
    except PermissionError:
        return False
    except OSError:  # the driver's answer for a broken GPU: it is there, and ours
        return True
    return True


def cpu_requested(environment: Mapping[str, str]) -> bool:
    """Whether CUDA_VISIBLE_DEVICES hides all GPUs, which asks for the CPU."""
    return environment.get("CUDA_VISIBLE_DEVICES", "all").strip() in _NO_GPU


def driver_version(file: Path = DRIVER_VERSION_FILE) -> str | None:
    """Return the version of the loaded kernel driver, such as ``580.65.06``; None if the file does not tell."""
    try:
        found = re.search(r"Kernel Module\D*?(?:x86_64|aarch64)?\s+(\d+\.\d+(?:\.\d+)?)\s", file.read_text())
    except OSError:
        return None
    return found[1] if found else None


def oldest_driver(cuda: str) -> int | None:
    """Return the oldest driver branch that runs a version of CUDA, such as 580 for ``13.0``; None if unknown."""
    major = cuda.partition(".")[0]
    return _OLDEST_DRIVER.get(int(major)) if major.isdecimal() else None


def why_unusable(
    environment: Mapping[str, str] = os.environ,
    devices: Sequence[Path] | None = None,
    driver: str | None = None,
) -> str | None:
    """Return why torch cannot use the GPUs of this node, and what to do about it, as one line.

    Args:
        environment: environment variables. A CUDA_VISIBLE_DEVICES that hides all GPUs asks for the CPU.
        devices: device files of the node's GPUs; None looks for them.
        driver: version of the node's driver; None reads it.

    Returns:
        None if torch can use a GPU, if there is none, or if the environment asks for the CPU.
    """
    if torch.cuda.is_available() or cpu_requested(environment):
        return None
    found = gpu_device_files() if devices is None else list(devices)
    if not found:
        return None
    node = f"this node has GPUs ({found[0]}), but torch {torch.__version__} cannot use them"
    cuda = torch.version.cuda
    if cuda is None:
        return f"{node}: it is a CPU build; install the GPU recipe with `make setup-gpu`, or {ON_THE_CPU}"
    driver = driver or driver_version()
    needed = oldest_driver(cuda)
    if driver is not None and needed is not None and int(driver.partition(".")[0]) < needed:
        return (
            f"{node}: driver {driver} is too old for its CUDA {cuda}, which needs {needed} or newer; ask for a newer "
            f"driver, use a container that has NVIDIA's cuda-compat package, or {ON_THE_CPU}"
        )
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    shown = "" if visible is None else f", CUDA_VISIBLE_DEVICES={visible}"
    return (
        f"{node}: {_cuda_error()} (CUDA {cuda}, driver {driver or 'unknown'}{shown}); run nvidia-smi, or {ON_THE_CPU}"
    )


def _cuda_error() -> str:
    """Return the first line of what CUDA says when it is initialised."""
    try:
        torch.cuda.init()
    except Exception as error:
        return first_line(error).rstrip(".")
    return "torch.cuda.is_available() is False"
