"""The Markdown pages: links and anchors resolve, the commands that they show exist, generated pages are current."""

from __future__ import annotations

import ast
import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import document_api
import document_configuration
import pytest
import torch
from field_docstrings import field_docstring

from megatron_rlvr.config import Config
from megatron_rlvr.config_schema import key_types
from megatron_rlvr.control import ClipThresholds
from megatron_rlvr.train import main
from tests.processes import ROOT

IGNORED = re.compile(r"\..*|build|runs|node_modules|.*\.egg-info")  # what tools and runs write
PAGES = sorted(p for p in ROOT.rglob("*.md") if not any(map(IGNORED.fullmatch, p.relative_to(ROOT).parts)))
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


def test_every_benchmark_that_a_page_names_runs_without_arguments() -> None:
    named = {name for page in PAGES for name in re.findall(r"tools/(benchmark_\w+)\.py", page.read_text())}
    assert len(named) >= 4
    for name in named - {"benchmark_step_trl"}:  # a part of benchmark_step
        for call in ast.walk(ast.parse((ROOT / "tools" / f"{name}.py").read_text())):
            if isinstance(call, ast.Call) and getattr(call.func, "attr", "") == "add_argument":
                options = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
                positional = not ast.literal_eval(call.args[0]).startswith("-")
                assert options.get("required") != "True", f"{name}: {ast.unparse(call)}"
                assert not positional or options.get("nargs") in ("'?'", "'*'"), f"{name}: {ast.unparse(call)}"


@pytest.mark.parametrize("page", ["README.md", "docs/entropy_control/results.md"])
def test_the_figures_of_a_page_are_those_of_the_study(page: str) -> None:
    text, study = (
        (ROOT / name).read_text().replace("−", "-").replace(" %", "") for name in (page, "docs/entropy_study.md")
    )
    quoted = re.findall(r"[+-]?\d\.\d+ ± \d\.\d+", text)
    assert quoted
    # Errors of each seed, of the present controller: the last column of the table.
    quoted += re.findall(r"\| (\d+\.\d(?:, \d+\.\d){4}) \|\n", text)
    assert [figure for figure in quoted if figure not in study] == []


def test_the_python_example_of_the_readme_runs() -> None:
    (example,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), flags=re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {}
    exec(example, names)
    leaf = names["logits"].grad_fn.next_functions[0][0].variable  # the example ends with a backward pass
    assert leaf.grad.abs().sum(1).gt(0).all()


def examples_of(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / page).read_text(), flags=re.MULTILINE | re.DOTALL)


def test_the_python_example_of_the_operators_page_runs() -> None:
    (example,) = examples_of("operators.md")
    torch.manual_seed(0)
    leaf = torch.randn(12, 50, requires_grad=True)
    targets = torch.randint(50, (12,))
    exec(
        example,
        {
            "logits": 2.0 * leaf,
            "targets": targets,
            "tp_group": None,
            "old_logprob": torch.log_softmax(2.0 * leaf.detach(), dim=-1)[range(12), targets],
            "advantage": torch.randn(12),
            "thresholds": ClipThresholds(),
            "mask": torch.ones(12, dtype=torch.bool),
            "weights": torch.full((12,), 1 / 12),
        },
    )
    assert leaf.grad is not None
    assert leaf.grad.abs().sum(1).gt(0).all()


def test_the_python_example_of_the_entropy_guide_runs() -> None:
    (example,) = examples_of("entropy_control/guide.md")
    torch.manual_seed(0)
    leaf = torch.randn(12, 50, requires_grad=True)
    names: dict[str, Any] = {
        "total_steps": 10,
        "logits_of": lambda rows: 2.0 * leaf[rows],
        "targets": torch.randint(50, (12,)),
        "temperature": 1.0,
        "advantage": torch.randn(12),
        "token_weight": torch.full((12,), 1 / 12),
        "learning_rate": 1e-6,
        "peak_learning_rate": 1e-6,
        "minibatches": [slice(0, 6), slice(6, 12)],
        "optimizer": torch.optim.SGD([leaf], lr=1.0),
        "step": 0,
    }
    before = leaf.detach().clone()
    exec(example, names)
    assert (leaf != before).any(1).all()
    assert names["metrics"]["control/target"] > 0
    assert names["thresholds"].steering != 0
    assert names["metrics"]["control/steering"] != 0
    assert names["state"]["schedule"] == "target-entropy"


def test_the_python_example_of_the_metrics_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (example,) = examples_of("metrics.md")
    monkeypatch.chdir(tmp_path)
    for run, seconds in (("a", 1.0), ("b", 2.0)):
        (tmp_path / "runs" / run).mkdir(parents=True)
        (tmp_path / "runs" / run / "metrics.jsonl").write_text(json.dumps({"step": 0, "time/step": seconds}) + "\n")
    exec(example, {})
    (tmp_path / "runs" / "b" / "metrics.jsonl").write_text('{"step": 0, "reward": 1.0}\n')
    with pytest.raises(AssertionError):
        exec(example, {})


@pytest.mark.parametrize("tool", [document_api, document_configuration], ids=lambda tool: tool.__name__)
def test_generated_pages_are_those_of_the_docstrings(tool: ModuleType) -> None:
    for path, text in tool.pages().items():
        # Not a comparison inside the assert: pytest would spend minutes on the difference of two long texts.
        current = path.is_file() and path.read_text() == text
        command = f"python tools/{tool.__name__}.py"
        assert current, f"{path.relative_to(ROOT)} is out of date: run `make docs` ({command})"


def fields_of(section: type) -> Iterator[tuple[type, str]]:
    """Every field of a section and of those in it, as (class that documents it, its name there)."""
    for field in dataclasses.fields(section):
        wanted = key_types(section)[field.name]
        if wanted.by_name is not None:
            yield section, field.name
            for parameters in wanted.by_name.values():
                for parameter in dataclasses.fields(parameters):
                    if parameter.name != "name":
                        yield parameter.metadata.get("source", (parameters, parameter.name))
        elif wanted.is_section:
            yield from fields_of(wanted.type)
        else:
            yield section, field.name


def test_every_configuration_key_has_a_docstring() -> None:
    fields = list(fields_of(Config))
    assert len(fields) > 150
    assert [f"{owner.__name__}.{name}" for owner, name in fields if not field_docstring(owner, name)] == []


def test_help_names_every_section_and_the_reference(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    reference = (ROOT / "docs" / "configuration.md").read_text()
    for name, wanted in key_types(Config).items():
        assert re.search(rf"^  {name} +\w.+$" if wanted.is_section else rf"\b{name}\b", text, flags=re.MULTILINE), name
        assert f"`{name}`" in reference
    assert "key=value" in text
    assert "docs/configuration.md" in text
    assert max(map(len, text.splitlines())) <= 120
