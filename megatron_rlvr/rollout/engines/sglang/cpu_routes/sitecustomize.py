"""Let SGLang record routes on a machine without a GPU.

SGLang 0.5.23 stores routes in host memory that it registers with CUDA, on a CPU as well, where the call fails. Python
imports this module at the start of a server's processes if its folder is on PYTHONPATH, where `Server` puts it for
servers on a CPU that record routes. Nothing else of SGLang changes.
"""

import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

_MODULE = "sglang.srt.mem_cache.pool_host.common"
_FUNCTION = "_cuda_host_register"


class _WithoutRegistration(MetaPathFinder):
    """Replaces the function that registers host memory when its module is imported."""

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if name == _MODULE else None
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def without_registration(module: ModuleType) -> None:
            execute(module)
            if hasattr(module, _FUNCTION):
                setattr(module, _FUNCTION, lambda *_arguments: None)

        spec.loader.exec_module = without_registration  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, _WithoutRegistration())
