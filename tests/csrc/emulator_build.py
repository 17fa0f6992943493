"""Compiles the CUDA sources with the host compiler and the emulator, in a directory named by a hash of the inputs."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11

REPOSITORY = Path(__file__).resolve().parents[2]
SOURCES = REPOSITORY / "csrc"
TESTS = Path(__file__).resolve().parent
EMULATOR = TESTS / "emulator"
CACHE = REPOSITORY / "build" / "emulator"
MODULE = "emulated_kernels"

COMPILER = os.environ.get("CXX", "g++")
FLAGS = ["-std=c++17", "-fPIC", "-pthread", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-ffp-contract=off"]


def kernel_sources(sources: Path = SOURCES) -> list[Path]:
    """Every ``.cu`` file of csrc/cuda."""
    return sorted((sources / "cuda").glob("*.cu"))


def _run(command: list[str | Path]) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{result.stdout}{result.stderr}")


def _digest(sources: Path, flags: list[str]) -> str:
    digest = hashlib.sha256(repr([COMPILER, FLAGS, flags, sysconfig.get_config_var("SOABI")]).encode())
    inputs = [*sorted(sources.glob("*.h")), *sorted((sources / "cuda").glob("*.*")), *sorted(EMULATOR.glob("*.h"))]
    for path in [*inputs, *sorted(TESTS.glob("*.cpp"))]:
        digest.update(path.name.encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def build_module() -> Path:
    """The directory with the Python module of the emulated kernels, which is built if it does not exist."""
    directory = CACHE / _digest(SOURCES, ["module"])
    library = directory / f"{MODULE}{sysconfig.get_config_var('EXT_SUFFIX')}"
    if library.exists():
        return directory
    work = directory.with_name(f"{directory.name}.{os.getpid()}")  # so that two test runs do not collide
    work.mkdir(parents=True)
    include = [f"-I{EMULATOR}", f"-I{SOURCES}", f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    sources = [TESTS / "emulator_module.cpp", *kernel_sources()]

    def compile_one(source: Path) -> Path:
        target = work / f"{source.name}.o"
        optimise = "-O1" if source.suffix == ".cpp" else "-O2"
        _run([COMPILER, *FLAGS, optimise, "-fvisibility=hidden", *include, "-x", "c++", "-c", source, "-o", target])
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, sources))
    _run([COMPILER, "-shared", "-pthread", *objects, "-o", work / library.name])
    _publish(work, directory)
    return directory


def build_driver(flags: list[str], sources: Path = SOURCES) -> Path:
    """The stand-alone program ``driver.cpp`` with the kernels in ``sources``, compiled with extra flags."""
    directory = CACHE / _digest(sources, flags)
    program = directory / "driver"
    if program.exists():
        return program
    work = directory.with_name(f"{directory.name}.{os.getpid()}")
    work.mkdir(parents=True)
    include = [f"-I{EMULATOR}", f"-I{sources}"]
    _run([COMPILER, *FLAGS, *flags, *include, TESTS / "driver.cpp", "-o", work / "driver"])
    _publish(work, directory)
    return program


def _publish(work: Path, directory: Path) -> None:
    try:
        work.rename(directory)
    except OSError:  # another test run was first; its result is the same
        shutil.rmtree(work)
