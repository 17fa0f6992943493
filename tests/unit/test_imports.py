"""The import rules of CONTRIBUTING.md: one package touches megatron-core, and packages import downhill."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from tests.processes import ROOT

PACKAGE = ROOT / "megatron_rlvr"


def imported_modules(file: Path) -> Iterator[str]:
    """Every module that a file imports, at its top or inside a function."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def packages_in_order() -> list[str]:
    """The packages of CONTRIBUTING's table, from top to bottom."""
    rows = re.findall(r"^\| `(\w+)` \|", (ROOT / "CONTRIBUTING.md").read_text(), flags=re.MULTILINE)
    return [name for name in rows if (PACKAGE / name).is_dir()]


def test_one_package_imports_megatron_core() -> None:
    files = [file for folder in ("megatron_rlvr", "tools", "examples") for file in (ROOT / folder).rglob("*.py")]
    importers = {
        str(file.relative_to(ROOT))
        for file in files
        if any(re.match(r"megatron(\.|$)", module) for module in imported_modules(file))
    }
    assert importers
    assert {name for name in importers if not name.startswith("megatron_rlvr/megatron/")} == set()


def test_packages_import_downhill() -> None:
    order = packages_in_order()
    assert set(order) == {entry.parent.name for entry in PACKAGE.glob("*/__init__.py")}
    for importer in order:
        uphill = {"train", *order[: order.index(importer)]}
        for file in (PACKAGE / importer).rglob("*.py"):
            for module in imported_modules(file):
                imported = re.match(r"megatron_rlvr\.(\w+)", module)
                assert imported is None or imported[1] not in uphill, f"{file.relative_to(ROOT)} imports {module}"


def test_the_map_names_the_packages_that_import_a_package() -> None:
    """The last column of CONTRIBUTING's table; "everything above" names all packages in the rows above."""
    rows = re.findall(r"^\| `(\w+)` \|.*\|([^|]+)\|$", (ROOT / "CONTRIBUTING.md").read_text(), flags=re.MULTILINE)
    users, order = dict(rows), packages_in_order()
    importers: dict[str, set[str]] = {name: set() for name in order}
    for importer in order:
        for file in (PACKAGE / importer).rglob("*.py"):
            for module in imported_modules(file):
                found = re.match(r"megatron_rlvr\.(\w+)", module)
                if found is not None and found[1] in importers and found[1] != importer:
                    importers[found[1]].add(importer)
    for name, found_in in importers.items():
        named = {word for word in re.findall(r"`(\w+)`", users[name]) if word in order}
        if "everything above" in users[name]:
            assert found_in - named <= set(order[: order.index(name)]), name
        else:
            assert found_in == named, name


def test_control_and_ops_stand_alone() -> None:
    for package in ("control", "ops"):
        for file in (PACKAGE / package).rglob("*.py"):
            ours = {module for module in imported_modules(file) if module.startswith("megatron_rlvr.")}
            assert {module for module in ours if not module.startswith(f"megatron_rlvr.{package}")} == set(), file


def test_the_shared_modules_of_the_root_import_no_package() -> None:
    for name in (
        "errors",
        "checked_input",
        "checked_yaml",
        "atomic_write",
        "config_schema",
        "bound_to_parent",
        "log_tail",
        "lifecycle",
    ):
        for module in imported_modules(PACKAGE / f"{name}.py"):
            imported = re.match(r"megatron_rlvr\.(\w+)", module)
            assert imported is None or not (PACKAGE / imported[1]).is_dir(), f"{name}.py imports {module}"
