"""Replaces sgl_kernel on a CPU, for which no registry has a build: every name imports, and calling one raises."""

from typing import Any, NoReturn


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*_: Any, **__: Any) -> NoReturn:
        raise NotImplementedError(f"sgl_kernel.{name}: no CPU build of sgl_kernel is installed")

    return missing
