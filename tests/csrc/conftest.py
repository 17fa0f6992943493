"""Fixtures: the CUDA kernels, compiled for the CPU once and cached under build/emulator."""

from __future__ import annotations

import importlib.util
import shutil

import emulator_build as building
import pytest
from emulated import Kernels


@pytest.fixture(scope="session")
def compiled() -> None:
    if shutil.which(building.COMPILER) is None:
        pytest.skip(f"no C++ compiler: {building.COMPILER} is not on PATH; install g++ or set CXX")


@pytest.fixture(scope="session")
def _module(compiled: None) -> Kernels:
    directory = building.build_module()
    (library,) = directory.glob(f"{building.MODULE}*.so")
    spec = importlib.util.spec_from_file_location(building.MODULE, library)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return Kernels(module)


@pytest.fixture
def kernels(_module: Kernels) -> Kernels:
    _module.set_order(0)
    _module.reset_traffic()
    return _module
