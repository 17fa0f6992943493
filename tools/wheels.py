"""Wheels of released packages, whose sources the recording tools read without importing them."""

from __future__ import annotations

import ast
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from megatron_rlvr.errors import UserError


class Wheel:
    """The sources of a wheel, by path."""

    def __init__(self, path: Path):
        self.archive = zipfile.ZipFile(path)
        self.names = set(self.archive.namelist())

    def text(self, name: str) -> str:
        return self.archive.read(name).decode()

    def module(self, name: str) -> ast.Module | None:
        """Parse a module by its dotted name; None if the wheel has no such Python source."""
        path = name.replace(".", "/")
        for candidate in (f"{path}.py", f"{path}/__init__.py"):
            if candidate in self.names:
                return ast.parse(self.text(candidate))
        return None

    def is_package(self, name: str) -> bool:
        return f"{name.replace('.', '/')}/__init__.py" in self.names


@contextmanager
def wheels_of(versions: Mapping[str, str], folder: Path | None) -> Iterator[dict[str, Wheel]]:
    """Yield the wheel of each package.

    Args:
        versions: version of each package.
        folder: where the wheels are; None to download them with pip.

    Raises:
        UserError: if the folder lacks one.
    """
    with tempfile.TemporaryDirectory() as temporary:
        if folder is None:
            folder = Path(temporary)
            wanted = [f"{name}=={version}" for name, version in versions.items()]
            command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder), *wanted]
            subprocess.run(command, check=True)
        wheels = {}
        for name, version in versions.items():
            if not (found := sorted(folder.glob(f"{name.replace('-', '_')}-{version}-*.whl"))):
                raise UserError(f"{folder} has no wheel of {name} {version}: download it with pip download --no-deps")
            wheels[name] = Wheel(found[0])
        yield wheels
