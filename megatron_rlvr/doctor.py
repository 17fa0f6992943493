"""Compares what is installed with the GPU recipe: ``python -m megatron_rlvr.doctor [--for gpu|cpu] [--brief]``.

Prints a table: what, the installed version, the version that the recipe wants, and what to do. Exit status 2 if
training would fail on this node. The recipe is the extras `train` and `gpu` of pyproject.toml. It needs none of them to
run.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_rlvr.errors import first_line
from megatron_rlvr.exit_status import EXIT_DONE, EXIT_USER_ERROR, status_is_returned

INSTALL = "make setup-gpu"
OLDEST_GLIBC = (2, 34)
SUPPORTED_TRANSFORMER_ENGINE = ">=2.9,<2.12"
"""Versions of Transformer Engine whose names megatron-core 0.16.1 imports."""
NO_SERVERS = "none"

# Without these packages, or with others than these versions, training fails. Others are only not tested.
_NEEDED = {
    "megatron-core": "==0.16.1",
    "transformer-engine": SUPPORTED_TRANSFORMER_ENGINE,
    "sglang": "",
    "torch": ">=2.10",
}
_PROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"
_NCCL = "import torch; print('.'.join(map(str, torch.cuda.nccl.version())))"
_NCCL_TIMEOUT_S = 120


@dataclass(frozen=True)
class Finding:
    """A row of the table.

    Attributes:
        name: what was looked at.
        installed, wanted: what was found, and what the recipe wants.
        remedy: what to do; empty if nothing.
        fails: whether training would fail.
    """

    name: str
    installed: str
    wanted: str = ""
    remedy: str = ""
    fails: bool = False


def pins(*extras: str) -> dict[str, str]:
    """Return the versions that extras of this project pin, by package name.

    Args:
        extras: names of extras, such as ``gpu``.
    """
    if _PROJECT.is_file():
        declared = tomllib.loads(_PROJECT.read_text())["project"]["optional-dependencies"]
        lines = [line for extra in extras for line in declared[extra]]
    else:  # installed from a wheel
        marked = [line.partition(";") for line in importlib.metadata.requires("megatron-rlvr") or []]
        lines = [
            line for line, _, marker in marked if any(f'"{extra}"' in marker.replace("'", '"') for extra in extras)
        ]
    return dict(match.groups() for line in lines if (match := re.match(r"([\w-]+)==([\w.]+)", line)))  # type: ignore[misc]


def installed(name: str) -> str | None:
    """Return the installed version of a package, None if it is missing."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def examine(on_gpu: bool, servers_python: str | None = None) -> Iterator[Finding]:
    """Look at everything that training needs on this node.

    Args:
        on_gpu: whether the node is to train on GPUs.
        servers_python: the Python of SGLang's servers (``rollout.sglang.python``). None means this one, `NO_SERVERS`
            that the servers are started elsewhere.
    """
    version = platform.python_version()
    fits = (3, 11) <= sys.version_info < (3, 13)
    yield Finding("python", version, "3.11 or 3.12", "" if fits else "make setup PYTHON=python3.11", not fits)
    if on_gpu:
        yield from _system()
    yield from _packages(on_gpu, sglang_here=servers_python is None)
    if installed("torch") is None:
        return
    if on_gpu:
        yield from _gpus()
        yield _transformer_engine()
        yield from _nccl(servers_python)
    yield _operators(on_gpu)


def _system() -> Iterator[Finding]:
    library, glibc = platform.libc_ver()
    numbers = tuple(int(part) for part in glibc.split(".") if part.isdecimal())
    old = library == "glibc" and numbers < OLDEST_GLIBC
    remedy = "SGLang's wheel needs it: use the container (examples/container)" if old else ""
    yield Finding("glibc", glibc or "unknown", "2.34 or newer", remedy, old)
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    remedy = "" if compiler else "triton compiles with it at run time: install gcc, load its module, or set CC"
    yield Finding("C compiler", compiler or "missing", "any", remedy, not compiler)


def _packages(on_gpu: bool, sglang_here: bool) -> Iterator[Finding]:
    remedy = INSTALL if on_gpu else "make setup"
    train = pins("train")
    for name, wanted in (train | pins("gpu" if on_gpu else "cpu")).items():
        found = installed(name)
        needed = (name in train or name in _NEEDED) and (name != "sglang" or sglang_here)
        if found is None:
            yield Finding(name, "missing", wanted, remedy if needed else f"not tested: {remedy}", needed)
        elif found.partition("+")[0] == wanted:
            yield Finding(name, found, wanted)
        else:
            unsupported = name in _NEEDED and not _satisfies(found, _NEEDED[name])
            yield Finding(name, found, wanted, remedy if unsupported else f"not tested: {remedy}", unsupported)


def _satisfies(version: str, specifier: str) -> bool:
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(specifier, prereleases=True).contains(version)


def _gpus() -> Iterator[Finding]:
    import torch

    from megatron_rlvr.gpu_node import driver_version, gpu_device_files, oldest_driver, why_unusable

    cuda, driver, devices = torch.version.cuda, driver_version(), gpu_device_files()
    if cuda is None:
        yield Finding("CUDA of torch", "none: a CPU build", "13.0", INSTALL, fails=True)
        return
    needed = oldest_driver(cuda)
    if not devices:
        yield Finding("GPUs", "none", "", f"not checked here; GPU nodes need driver {needed} or newer for CUDA {cuda}")
        return
    reason = why_unusable()
    yield Finding("driver", driver or "unknown", f"{needed} or newer for CUDA {cuda}")
    if reason or not torch.cuda.is_available():
        remedy = reason or "CUDA_VISIBLE_DEVICES hides them: unset it to train on them"
        yield Finding("GPUs", f"{len(devices)}, unusable", "", remedy, fails=True)
        return
    capability = torch.cuda.get_device_capability()
    old = capability < (8, 0)
    found = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    yield Finding("GPUs", found, "A100 or newer", "the CUDA kernels do not run on it" if old else "", old)


def _transformer_engine() -> Finding:
    """Load Transformer Engine, or without a driver, which it needs to load, look for its library."""
    name = "Transformer Engine loads"
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        built = importlib.util.find_spec("transformer_engine_torch") is not None
        return Finding(name, "not tried: no driver", "", "" if built else INSTALL, not built)
    try:
        importlib.import_module("transformer_engine.pytorch")
    except Exception as error:
        remedy = f"{INSTALL} builds it for the installed torch"
        return Finding(name, f"no: {first_line(error)[:120]}", "yes", remedy, fails=True)
    return Finding(name, "yes", "yes")


def _nccl(servers_python: str | None) -> Iterator[Finding]:
    """Compare the NCCL that torch has loaded with the recipe's and with that of the servers' environment."""
    import torch

    if torch.version.cuda is None:
        return
    loaded, wanted = ".".join(map(str, torch.cuda.nccl.version())), pins("gpu")["nvidia-nccl-cu13"]
    remedy = "" if loaded == wanted else "not tested: remove other NCCL libraries from LD_LIBRARY_PATH and LD_PRELOAD"
    yield Finding("NCCL that torch loads", loaded, wanted, remedy)
    if servers_python in (None, NO_SERVERS):
        return
    try:
        done = subprocess.run([servers_python, "-c", _NCCL], capture_output=True, text=True, timeout=_NCCL_TIMEOUT_S)
        theirs = done.stdout.strip() or (done.stderr.strip().splitlines() or ["no answer"])[-1]
    except (OSError, subprocess.TimeoutExpired) as error:
        theirs = str(error)
    unequal = theirs != loaded
    remedy = "the trainer and the servers cannot form a group: use one environment for both" if unequal else ""
    yield Finding(f"NCCL of {servers_python}", theirs, loaded, remedy, unequal)


def _operators(on_gpu: bool) -> Finding:
    from megatron_rlvr.ops import compiled

    if not on_gpu:
        backend = compiled.backend()
        return Finding("operators", backend, "compiled", "make setup: slow" if backend == "reference" else "")
    allowed = os.environ.get("MEGATRON_RLVR_OPS") == "reference"
    found = "with CUDA" if compiled._serves_cuda else "MEGATRON_RLVR_OPS=reference" if allowed else "no CUDA kernels"
    good = compiled._serves_cuda or allowed
    return Finding("operators", found, "with CUDA", "" if good else f"{INSTALL} compiles them", not good)


def table(findings: Sequence[Finding]) -> str:
    """Return findings as a table, one line each."""
    rows = [("", "installed", "wanted", "what to do")]
    rows += [
        (f.name, f.installed, f.wanted, ("FAILS: " if f.fails else "") + f.remedy if f.remedy else "ok")
        for f in findings
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, [*widths, 0], strict=True)) for row in rows
    )


def has_gpu() -> bool:
    """Whether this node has a GPU that this process may use."""
    if installed("torch") is None:
        return any(Path("/dev").glob("nvidia[0-9]*"))
    from megatron_rlvr.gpu_node import cpu_requested, gpu_device_files

    return bool(gpu_device_files()) and not cpu_requested(os.environ)


@status_is_returned
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 0, or 2 if training would fail."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--for", dest="target", choices=["gpu", "cpu"], help="default: gpu if this node has one")
    parser.add_argument("--servers-python", metavar="PATH", help="rollout.sglang.python; none: no servers here")
    parser.add_argument("--brief", action="store_true", help="print only what makes training fail, one line each")
    parser.add_argument("--pin", metavar="PACKAGE", help="print the package with the recipe's version and end")
    options = parser.parse_args(arguments)
    if options.pin:
        print(f"{options.pin}=={pins('train', 'gpu')[options.pin]}")
        return EXIT_DONE
    target = options.target or ("gpu" if has_gpu() else "cpu")
    findings = list(examine(target == "gpu", options.servers_python))
    failing = [finding for finding in findings if finding.fails]
    if options.brief:
        for finding in failing:
            wanted = f", wanted {finding.wanted}" if finding.wanted else ""
            print(f"{finding.name}: {finding.installed}{wanted}: {finding.remedy}")
    else:
        print(table(findings))
        verdict = f"training would fail: {', '.join(f.name for f in failing)}" if failing else "training can start"
        print(f"\non {target.upper()}s: {verdict}")
    return EXIT_USER_ERROR if failing else EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
