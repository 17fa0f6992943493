"""Write docs/configuration.md from the sections of the configuration: types, bounds, defaults and docstrings.

python tools/document_configuration.py        # make docs
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import document_api
from field_docstrings import field_docstring

from megatron_rlvr.config import Config
from megatron_rlvr.config_schema import LARGEST_INT, REQUIRED, Bounds, KeyType, key_types
from megatron_rlvr.control.build import SCHEDULES
from megatron_rlvr.objectives import OBJECTIVES
from megatron_rlvr.resume import FIXED, IDENTITY, MAY_CHANGE

PAGE = Path(__file__).resolve().parents[1] / "docs" / "configuration.md"


def listed(names: Iterable[str]) -> str:
    """`a`, `b` and `c`."""
    *first, last = (f"`{name}`" for name in names)
    return f"{', '.join(first)} and {last}" if first else last


INTRODUCTION = f"""# Configuration

Generated from the sections of the configuration by `make docs`. Do not edit this page.

A run is described by one YAML file and by overrides on the command line:

```bash
python -m megatron_rlvr.train run.yaml optimizer.learning_rate=1e-6 algorithm.schedule.name=constant
```

- An override is `key=value` with a dotted key and wins over the file. Its value is YAML, such as `rollout.stop=[END]`.
  The value of a key that takes text is everything after the equals sign, as it is written: `name=0123`, `name=a #1`.
  Only `null` and text in quotes are special there. Numbers and truth values follow YAML 1.2, also in files: `0123` is
  not octal, and `on` is text where text is expected.
- `verifier.options.NAME=1` changes one entry of a mapping; `verifier.options={{}}`, or a mapping with entries, replaces
  all that the file has.
- A key that is not set has its default. Unknown keys and impossible values are refused before anything starts.
- `${{section.key}}` in a value is replaced by the value of that key.
- `auto` is resolved when a program starts. The run's `config.yaml` keeps `auto`, so that a run on GPUs can be evaluated
  on a CPU.
- Starting the same command again resumes the run. {listed(IDENTITY)}
  may then only change if `resume.allow` names the key, except {listed(MAY_CHANGE)}.
  {listed(FIXED)} cannot change, nor can what else the form of a checkpoint depends on: the sizes of the model,
  `model.dtype` and `parallel.distributed_optimizer`. Everything else may change ([what may change on
  resume](checkpoints.md#continue-with-other-settings)).
- Every number has an upper bound. Where the tables name none, it is 2**31 - 1 for a whole number and 10**6 for another
  number.
- The keys of the first table are at the top level of the file, outside sections.
"""
DISCARDS = "Overriding `{0}.name` discards the parameters in the file, which belong to the {1} that is replaced."
BY_NAME: dict[str, tuple[str, dict[str, tuple[Any, dict[str, Any]]]]] = {
    "algorithm.objective": (
        "The token objective, chosen by `name`. " + DISCARDS.format("algorithm.objective", "objective"),
        OBJECTIVES,
    ),
    "algorithm.schedule": (
        "The schedule of clip thresholds, chosen by `name`. A threshold is intercept + slope * p, where p is the "
        "token's probability. " + DISCARDS.format("algorithm.schedule", "schedule"),
        SCHEDULES,
    ),
}


def pages() -> dict[Path, str]:
    """The generated page: path -> text."""
    blocks = [INTRODUCTION.rstrip(), *section("", Config)]
    return {PAGE: "\n\n".join(block for block in blocks if block) + "\n"}


def section(key: str, kind: type) -> Iterator[str]:
    """The blocks of a section and of its subsections."""
    if key:
        yield f"## `{key}`"
        yield document_api.markdown(inspect.getdoc(kind) or "")
    expected_types = key_types(kind)
    yield table(
        [
            row(field, expected_types[field.name], field_docstring(kind, field.name))
            for field in dataclasses.fields(kind)
            if not expected_types[field.name].is_section
        ]
    )
    for name, expected in expected_types.items():
        listed_type = expected.or_list or expected
        if listed_type.is_section_list and listed_type.element:
            yield f"An entry of the list `{key}.{name}` has:"
            element = listed_type.element.type
            kinds = key_types(element)
            yield table([row(f, kinds[f.name], field_docstring(element, f.name)) for f in dataclasses.fields(element)])
    inner = {f"{key}.{name}".lstrip("."): expected for name, expected in expected_types.items() if expected.is_section}
    if not key:
        yield "Sections:"
        rows = [
            f"| [`{name}`](#{anchor(name)}) | {document_api.summary(inspect.getdoc(expected.type) or '')} |"
            for name, expected in inner.items()
        ]
        yield "\n".join(["| section | what it sets |", "| --- | --- |", *rows])
    for name, expected in inner.items():
        if expected.by_name is None:
            yield from section(name, expected.type)
        else:
            yield from choices(name, expected.by_name)


def choices(key: str, by_name: Mapping[str, type]) -> Iterator[str]:
    """The blocks of a section whose parameters depend on its key ``name``: shared parameters, then each name's own."""
    introduction, registered = BY_NAME[key]
    yield f"## `{key}`"
    yield introduction
    names: dict[type, list[str]] = {}  # several names may stand for one class, with other defaults
    for name, (described, _) in registered.items():
        names.setdefault(described, []).append(name)
    takers: dict[str, list[type]] = {}  # row of a parameter -> classes that take it
    for described, (name, *_) in names.items():
        for text in parameter_rows(by_name[name]):
            takers.setdefault(text, []).append(described)
    tables: dict[tuple[type, ...], list[str]] = {}
    for text, classes in takers.items():
        tables.setdefault(tuple(classes), []).append(text)
    for sharing, rows in tables.items():
        if len(sharing) > 1:
            taking = listed(name for described in sharing for name in names[described])
            yield f"Every {key.split('.')[-1]} takes:" if len(sharing) == len(names) else f"{taking} take:"
            yield table(rows)
    for described, (first, *others) in names.items():
        yield f"### {', '.join(f'`{name}`' for name in (first, *others))}"
        for name in others:
            preset = listed(f"{parameter}: {yaml(value)}" for parameter, value in registered[name][1].items())
            yield f"`{name}` is `{first}` with other defaults: {preset}."
        yield document_api.markdown(inspect.getdoc(described) or "")
        yield table(tables.get((described,), []))


def parameter_rows(parameters: type) -> Iterator[str]:
    """The rows of the parameters of a schedule or objective, each described where it is defined."""
    expected_types = key_types(parameters)
    for field in dataclasses.fields(parameters):
        if field.name != "name":
            source, name = field.metadata.get("source", (parameters, field.name))
            yield row(field, expected_types[field.name], field_docstring(source, name))


def table(rows: list[str]) -> str:
    return "\n".join(["| key | takes | default | meaning |", "| --- | --- | --- | --- |", *rows]) if rows else ""


def row(field: dataclasses.Field[Any], expected: KeyType, docstring: str) -> str:
    """The row of a key in a table."""
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    shown = "required" if default == REQUIRED else f"`{yaml(default)}`"
    cells = (f"`{field.name}`", takes(expected), shown, document_api.markdown(docstring))
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def takes(expected: KeyType) -> str:
    """What a key takes, in words."""
    if expected.choices:
        words = ", ".join(f"`{choice}`" for choice in expected.choices)
    elif expected.is_section_list and expected.element:
        words = f"list of sections with {listed(key_types(expected.element.type))}"
    elif expected.type is list and expected.element is not None:
        words = f"list of {takes(expected.element)}"
    elif expected.type is dict:
        words = "names and values"
    else:
        words = {int: "whole number", float: "number", bool: "`true`, `false`", str: "text"}[expected.type]
    if expected.limits is not None:
        words += f" {expected.limits}"
        cap = getattr(expected.limits, "cap", None)
        if cap not in (None, LARGEST_INT, 1e6) and not str(expected.limits).startswith("in "):
            words += f", {expected.limits.cap_words}" if isinstance(expected.limits, Bounds) else f", at most {cap:g}"
            words += " or `.inf`" if getattr(expected.limits, "infinite", False) else ""
    words += f", or {takes(expected.or_list)}" if expected.or_list is not None else ""
    return words + (" or `null`" if expected.optional else "")


def yaml(value: Any) -> str:
    """A value as YAML writes it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return f"[{', '.join(map(yaml, value))}]"
    return str(value)


def anchor(heading: str) -> str:
    """The anchor that GitHub gives to a heading."""
    return heading.replace(".", "")


def main() -> None:
    for path, text in pages().items():
        path.write_text(text)
        print(path)


if __name__ == "__main__":
    main()
