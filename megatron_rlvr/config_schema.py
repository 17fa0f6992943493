"""Configuration keys as dataclass fields: unknown keys and wrong types are refused in one line."""

from __future__ import annotations

import dataclasses
import difflib
import types
from collections.abc import Iterator
from typing import Any, get_args, get_origin, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException

from megatron_rlvr.errors import UserError


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split("\n    full_key")[0].split())


def _type(schema: type, name: str) -> Any:
    """The type of a field, int for ``int | None``."""
    found = get_type_hints(schema)[name]
    return get_args(found)[0] if isinstance(found, types.UnionType) else found


def _kind(wanted: Any, key: str, value: Any) -> str:
    """What a key takes, in words that end "X must be ...", and how it is written."""
    if dataclasses.is_dataclass(wanted):
        return f"a section: write {key}.{dataclasses.fields(wanted)[0].name}=... and the like"
    if get_origin(wanted) is dict:
        return f"a section: write {key}.name={value if isinstance(value, str) else '...'} and the like"
    if get_origin(wanted) is list:
        return f"a list: write {key}=[{value if isinstance(value, str) else '...'}]"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[wanted]


def check_shape(given: Any, schema: type, root: type, prefix: str = "") -> None:
    """Refuse unknown keys, keys without a value, single values where a section belongs, and the other way round.

    Raises:
        UserError: for the first that is wrong.
    """
    for name, value in given.items():
        key = f"{prefix}{name}"
        if name not in (field.name for field in dataclasses.fields(schema)):
            raise UserError(f"unknown configuration key {key}: {_hint(str(name), schema, root, prefix)}")
        wanted = _type(schema, name)
        section = dataclasses.is_dataclass(wanted) or get_origin(wanted) is dict
        if isinstance(value, str) and "${" in value:
            continue  # OmegaConf's to resolve
        several = get_origin(wanted) is list
        if value is None:
            if isinstance(get_type_hints(schema)[name], types.UnionType):
                continue
            raise UserError(f"{key} has no value: it must be {_kind(wanted, key, value)}")
        if section != isinstance(value, dict) or several != isinstance(value, list):
            raise UserError(f"{key}={value!r}: {key} must be {_kind(wanted, key, value)}")
        if dataclasses.is_dataclass(wanted):
            check_shape(value, wanted, root, f"{key}.")  # type: ignore[arg-type]


def _hint(name: str, schema: type, root: type, prefix: str) -> str:
    """What an unknown key in a section should have been."""
    known = [field.name for field in dataclasses.fields(schema)]
    if close := difflib.get_close_matches(name, known, n=1):
        return f"did you mean {prefix}{close[0]}?"
    elsewhere = [key for key in _keys(root) if key.split(".")[-1] == name]
    return f"did you mean {' or '.join(elsewhere)}?" if elsewhere else f"known keys: {', '.join(known)}"


def _keys(schema: type, prefix: str = "") -> Iterator[str]:
    """Every key of a section and of those in it, dotted."""
    for field in dataclasses.fields(schema):
        yield f"{prefix}{field.name}"
        wanted = _type(schema, field.name)
        if dataclasses.is_dataclass(wanted):
            yield from _keys(wanted, f"{prefix}{field.name}.")  # type: ignore[arg-type]


def refusal(error: OmegaConfBaseException, root: type, path: str, *given: Any) -> str:
    """One line on what OmegaConf refused in one of the `given` configurations, the last one first."""
    key = error.full_key or ""
    if key not in _keys(root) or isinstance(error, InterpolationResolutionError):
        return f"configuration key {key}: {one_line(error)}" if key else f"{path}: {one_line(error)}"
    *sections, name = key.split(".")
    schema: Any = root
    for section in sections:
        schema = _type(schema, section)
    values = [value for part in reversed(given) if (value := OmegaConf.select(part, key)) is not None]
    if not values:
        return f"{key} is not set: write it in the configuration file or give {key}=... on the command line"
    return f"{key}={values[0]!r}: {key} must be {_kind(_type(schema, name), key, values[0])}"
