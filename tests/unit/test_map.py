"""CONTRIBUTING's map shows every file and nothing that is gone."""

from __future__ import annotations

import re

from tests.processes import ROOT

# Code names in the first column of a table.
NAMES = re.compile(r"`([\w./-]+)`")


def files_on_the_map() -> set[str]:
    """Paths relative to the root, from the tables under headings that name a folder."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    sections = re.split(r"^### `([\w./-]+)`$", text, flags=re.MULTILINE)
    return {
        f"{folder}{name}"
        for folder, section in zip(sections[1::2], sections[2::2], strict=True)
        for first_cell in re.findall(r"^\| ([^|]+) \|", section.split("\n## ")[0], flags=re.MULTILINE)
        for name in NAMES.findall(first_cell)
    }


def test_every_file_is_on_the_map_and_nothing_else() -> None:
    package = ROOT / "megatron_rlvr"
    files = {
        str(path.relative_to(ROOT))
        for folder in (package, ROOT / "tools")
        for path in folder.rglob("*.py")
        # An __init__.py only re-exports, and the map says once that packages have a config.py.
        if path.name != "__init__.py" and not (path.name == "config.py" and path.parent != package)
    }
    shown = files_on_the_map()
    missing = sorted(files - shown)
    assert not missing, f"not on CONTRIBUTING's map: {missing}"
    gone = sorted(name for name in shown if not (ROOT / name).exists())
    assert not gone, f"on CONTRIBUTING's map, but gone: {gone}"
