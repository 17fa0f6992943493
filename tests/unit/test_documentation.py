"""The Markdown pages: links and anchors resolve, the commands that they show exist, generated pages are current."""

from __future__ import annotations

import re
from pathlib import Path

import document_api
import pytest

from tests.processes import ROOT

IGNORED = {".venv", ".venv-sglang", "build", "runs", "node_modules"}
PAGES = sorted(
    p for p in ROOT.rglob("*.md") if not IGNORED & set(p.relative_to(ROOT).parts) and ".egg-info" not in str(p)
)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def prose(page: Path) -> str:
    """The page without code blocks and code spans."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"`[^`\n]*`", "", text)


def code_blocks(page: Path) -> str:
    return "\n".join(re.findall(r"^```\w*\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL))


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to the page's headings."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    names: set[str] = set()
    for heading in re.findall(r"^#{1,6} (.+)$", text, flags=re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        base = name = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        count = 0
        while name in names:
            count += 1
            name = f"{base}-{count}"
        names.add(name)
    return names


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_anchors_resolve(page: Path) -> None:
    for link in LINK.findall(prose(page)):
        if re.match(r"[a-z]+:", link):
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), f"{page.relative_to(ROOT)} links to {link}, which does not exist"
        if anchor:
            assert anchor in anchors(target), f"{page.relative_to(ROOT)} links to {link}: no such heading"


def test_every_page_of_docs_is_in_the_index() -> None:
    index = ROOT / "docs" / "README.md"
    linked = {(index.parent / link.partition("#")[0]).resolve() for link in LINK.findall(index.read_text())}
    pages = {page for page in PAGES if index.parent in page.parents and page != index}
    assert sorted(pages - linked) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_programs_and_make_targets_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    text = page.read_text()
    commands = code_blocks(page) + "\n" + "\n".join(re.findall(r"`([^`\n]+)`", text))
    for target in re.findall(r"^\s*make ([a-z][a-z-]*)", commands, flags=re.MULTILINE):
        assert target in targets, f"{page.name} names `make {target}`"
    for program in re.findall(r"\b((?:tools|examples|tests)/[\w./-]+\.(?:py|sh|sbatch|yaml))\b", commands):
        assert (ROOT / program).exists(), f"{page.name} names {program}"
    for module in re.findall(r"-m ((?:megatron_rlvr|tests)[\w.]*)", commands):
        assert (ROOT / f"{module.replace('.', '/')}.py").exists(), f"{page.name} names module {module}"


def test_the_figures_of_the_readme_are_those_of_the_study() -> None:
    study = (ROOT / "docs" / "entropy_study.md").read_text()
    quoted = re.findall(r"\d\.\d+ ± \d\.\d+", (ROOT / "README.md").read_text())
    assert quoted
    assert [figure for figure in quoted if figure not in study] == []


def test_the_api_reference_is_that_of_the_docstrings() -> None:
    for path, text in document_api.pages().items():
        # Not a comparison inside the assert: pytest would spend minutes on the difference of two long texts.
        current = path.is_file() and path.read_text() == text
        assert current, f"{path.relative_to(ROOT)} is out of date: run `make docs` (python tools/document_api.py)"
