"""Write docs/api/ops.md and docs/api/control.md from the docstrings of the two public packages.

python tools/document_api.py        # make docs
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from types import ModuleType
from typing import Any

from megatron_rlvr import control, ops
from megatron_rlvr.control import regions

API = Path(__file__).resolve().parents[1] / "docs" / "api"
LINE_LENGTH = 100


def pages() -> dict[Path, str]:
    """The generated pages: path -> text."""
    return {API / "ops.md": page(ops, []), API / "control.md": page(control, [regions])}


def page(package: ModuleType, modules: list[ModuleType]) -> str:
    """The reference of a package's public classes and functions, and of the public functions of some of its modules."""
    public = {n: getattr(package, n) for n in package.__all__ if callable(getattr(package, n))}
    sections = [
        f"# `{package.__name__}`",
        "Generated from the docstrings by `make docs`. Do not edit this page.",
        markdown(inspect.getdoc(package) or ""),
        contents(package.__name__, public),
    ]
    for name, thing in public.items():
        sections += entry(name, thing)
    for module in modules:
        functions = {n: f for n, f in vars(module).items() if inspect.isfunction(f) and f.__module__ == module.__name__}
        public = {name: function for name, function in functions.items() if not name.startswith("_")}
        sections += [
            f"# `{module.__name__}`",
            markdown(inspect.getdoc(module) or ""),
            contents(module.__name__, public),
        ]
        for name, function in public.items():
            sections += entry(name, function)
    return "\n\n".join(section for section in sections if section) + "\n"


def contents(prefix: str, names: dict[str, Any]) -> str:
    """A table of names with the first sentence of their docstrings."""
    rows = [
        f"| [`{name}`](#{name.lower()}) | {summary(inspect.getdoc(thing) or '')} |" for name, thing in names.items()
    ]
    return "\n".join([f"| in `{prefix}` | |", "| --- | --- |", *rows])


def entry(name: str, thing: Any) -> list[str]:
    """The sections of one public name."""
    sections = [f"## `{name}`", signature(name, thing), bases(thing), markdown(inspect.getdoc(thing) or "")]
    if not inspect.isclass(thing):
        return sections
    for member_name, member in vars(thing).items():
        if member_name.startswith("_"):
            continue
        function = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
        if inspect.isfunction(function) and function.__doc__:
            title = f"### `{name}.{member_name}`"
            shown = "" if isinstance(member, property) else signature(member_name, function)
            sections += [title, shown, markdown(inspect.getdoc(function) or "")]
    return sections


def bases(thing: Any) -> str:
    """The public base classes of a class."""
    public = [base.__name__ for base in getattr(thing, "__bases__", ()) if base.__name__ in control.__all__]
    return f"Base class: {', '.join(f'[`{name}`](#{name.lower()})' for name in public)}." if public else ""


def signature(name: str, thing: Any) -> str:
    """The signature as a Python code block, with one parameter per line if it is long."""
    keyword = "class" if inspect.isclass(thing) else "def"
    declared = inspect.signature(thing)
    parameters: list[str] = []
    for parameter in declared.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in parameters:
            parameters.append("*")
        parameters.append(parameter_text(parameter))
    returned = declared.return_annotation
    returns = f" -> {returned}" if isinstance(returned, str) and keyword == "def" else ""
    text = f"{keyword} {name}({', '.join(parameters)}){returns}"
    if len(text) > LINE_LENGTH:
        text = "\n".join([f"{keyword} {name}(", *(f"    {parameter}," for parameter in parameters), f"){returns}"])
    return f"```python\n{text}\n```"


def parameter_text(parameter: inspect.Parameter) -> str:
    """``name: annotation = default``; a default that each object gets a new copy of is shown as ``...``."""
    text = parameter.name
    if parameter.annotation is not parameter.empty:
        annotation = parameter.annotation
        name = annotation if isinstance(annotation, str) else annotation.__name__
        text += ": " + re.sub(r"Annotated\[(\w+), [^]]*\]", r"\1", name)  # without the bounds
    if parameter.default is parameter.empty:
        return text
    shown = repr(parameter.default)
    return f"{text} = {'...' if shown.startswith('<') else shown}"


def summary(docstring: str) -> str:
    """The first sentence of a docstring, on one line."""
    first = markdown(docstring).split("\n\n")[0].replace("\n", " ")
    return re.split(r"(?<=\.)\s", first)[0].replace("|", "\\|")


def markdown(docstring: str) -> str:
    """A docstring (reStructuredText roles, literals and tables; Google sections) as Markdown."""
    text = re.sub(r":(?:class|func|meth|mod|attr):`~?([\w.]+)`", lambda m: f"`{m[1].rsplit('.', 1)[-1]}`", docstring)
    text = re.sub(r"``([^`]+)``", r"`\1`", text)
    text = re.sub(r"::$", ":", text, flags=re.MULTILINE)
    # A simple table is a paragraph that begins and ends with a line of = signs.
    text = re.sub(r"^(=+ +=[= ]*\n(?:.+\n)+=+ +=[= ]*)$", r"```\n\1\n```", text, flags=re.MULTILINE)
    text = re.sub(r"docs/([\w/]+\.md)", r"[\1](../\1)", text)
    text = re.sub(
        r"^(Args|Attributes|Returns|Raises|Yields):\n((?:(?: {4}.*)?\n?)+)", _section, text, flags=re.MULTILINE
    )
    return text.strip()


def _section(match: re.Match[str]) -> str:
    body = re.sub(r"^ {4}", "", match[2], flags=re.MULTILINE)
    items = re.sub(r"^(\*{0,2}\w[\w, ]*): ", r"- `\1`: ", body, flags=re.MULTILINE)
    items = re.sub(r"^ +", "  ", items, flags=re.MULTILINE)
    return f"{match[1]}:\n\n{items}\n"


def main() -> None:
    for path, text in pages().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        print(path)


if __name__ == "__main__":
    main()
