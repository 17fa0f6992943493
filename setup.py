"""Builds the package; pyproject.toml holds the metadata.

The compiled operators are built by CMake and Ninja into ``megatron_rlvr/ops/_C.so``: the CPU kernels always, the CUDA
kernels where nvcc is found and the installed torch is a CUDA build. Environment:

- ``MEGATRON_RLVR_CUDA=1`` compiles the CUDA kernels whichever torch is installed, ``=0`` never does;
- ``MEGATRON_RLVR_BUILD=0`` builds nothing; the eager reference then runs, with a warning;
- ``CXX``, ``CUDACXX`` and ``CMAKE_ARGS`` have their usual meaning.
"""

import importlib
import os
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import ExecError

ROOT = Path(__file__).resolve().parent

# An older setuptools rejects the license line of pyproject.toml with an error that does not name setuptools. A new venv
# of Python 3.11 has setuptools 65.
if int(setuptools.__version__.split(".")[0]) < 77:
    raise ExecError(
        f"megatron-rlvr: found setuptools {setuptools.__version__}, which cannot read pyproject.toml; "
        "`pip install 'setuptools>=77'`"
    )


def find_program(name: str) -> str | None:
    """The path of ``name``: on PATH, among this Python's scripts, or in the package of the same name."""
    path = shutil.which(name) or shutil.which(name, path=sysconfig.get_path("scripts"))
    if path is None:
        try:
            package = importlib.import_module(name)
        except ImportError:
            return None
        folder = getattr(package, "CMAKE_BIN_DIR", None) or getattr(package, "BIN_DIR", None)
        path = shutil.which(name, path=folder) if folder else None
    return path


def require(name: str, remedy: str) -> str:
    path = find_program(name)
    if path is None:
        raise ExecError(
            f"megatron-rlvr: no {name} found to compile the operators with; {remedy}, "
            "or set MEGATRON_RLVR_BUILD=0 to run the (much slower) eager reference"
        )
    return path


def find_nvcc() -> str | None:
    named = os.environ.get("CUDACXX")
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return (shutil.which(named) if named else None) or shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")


def choose_cuda(torch_has_cuda: bool) -> str | None:
    """The nvcc to compile CUDA kernels with, or None to leave them out; printed, so that a build log shows which."""
    choice = os.environ.get("MEGATRON_RLVR_CUDA", "")
    if choice not in ("", "0", "1"):
        raise ExecError(f"megatron-rlvr: MEGATRON_RLVR_CUDA must be 0, 1 or unset, found {choice!r}")
    nvcc = find_nvcc()
    if choice == "1" and nvcc is None:
        raise ExecError(
            "megatron-rlvr: MEGATRON_RLVR_CUDA=1, but no nvcc found; install the CUDA toolkit and put nvcc on the PATH "
            "(or name it in CUDACXX), or set MEGATRON_RLVR_CUDA=0 for the CPU kernels alone"
        )
    use_cuda = choice == "1" or (choice == "" and nvcc is not None and torch_has_cuda)
    if use_cuda:
        print(f"megatron-rlvr: CUDA kernels with {nvcc}")
        return nvcc
    reason = "MEGATRON_RLVR_CUDA=0" if choice == "0" else "no nvcc" if nvcc is None else "torch is a CPU build"
    print(f"megatron-rlvr: no CUDA kernels ({reason}); MEGATRON_RLVR_CUDA=1 compiles them")
    return None


class CMakeBuild(build_ext):
    def get_ext_filename(self, fullname: str) -> str:
        # Without the Python ABI in the name, because the library uses torch's stable ABI and not Python's.
        return str(Path(*fullname.split("."))) + ".so"

    def build_extension(self, extension: Extension) -> None:
        import torch

        cmake = require("cmake", "`pip install cmake`")
        ninja = require("ninja", "`pip install ninja`")
        compiler = shlex.split(os.environ.get("CXX", "c++"))[0]
        require(compiler, "install one (Debian: `apt-get install g++`; or name it in CXX)")
        nvcc = choose_cuda(torch.version.cuda is not None)
        target = Path(self.get_ext_fullpath(extension.name)).resolve()
        build = ROOT / "build" / ("operators-cuda" if nvcc else "operators")
        arguments = [
            f"-DCMAKE_MAKE_PROGRAM={ninja}",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DTORCH_DIRECTORY={Path(torch.__file__).parent}",
            f"-DMEGATRON_RLVR_CUDA={'ON' if nvcc else 'OFF'}",
            *([f"-DCMAKE_CUDA_COMPILER={nvcc}"] if nvcc else []),
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        subprocess.run([cmake, "-G", "Ninja", "-S", str(ROOT), "-B", str(build), *arguments], check=True)
        subprocess.run([cmake, "--build", str(build)], check=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        # Replaced instead of overwritten, so that a process that has mapped the old library keeps it.
        temporary = target.with_suffix(".new")
        shutil.copyfile(build / "_C.so", temporary)
        temporary.replace(target)


if os.environ.get("MEGATRON_RLVR_BUILD", "1") == "0":
    print("megatron-rlvr: MEGATRON_RLVR_BUILD=0, no operators are compiled")
    setup()
else:
    setup(ext_modules=[Extension("megatron_rlvr.ops._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
