"""Convert plain values, as read from YAML, to configuration dataclasses; errors say what to write instead."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

from megatron_rlvr.checked_input import shown
from megatron_rlvr.config_schema import KeyType, key_types, keys
from megatron_rlvr.errors import UserError

T = TypeVar("T")

_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
_PLURALS = {int: "whole numbers", float: "numbers", str: "texts"}
_BOOLEANS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


def read(section: type[T], values: Mapping[str, Any]) -> T:
    """Build the dataclass ``section`` from ``values``; absent keys keep their defaults.

    Raises:
        UserError: for the first unknown key or value of the wrong type.
    """
    return _Reader(section).section(section, values, "")


def merge(values: Any, changes: Any) -> Any:
    """Return ``values`` with ``changes`` applied: mappings are merged key by key, anything else is replaced."""
    if not (isinstance(values, Mapping) and isinstance(changes, Mapping)):
        return changes
    return {**values, **{name: merge(values.get(name), change) for name, change in changes.items()}}


class _Reader:
    """Builds sections of the configuration ``root``, whose keys it suggests for unknown ones."""

    def __init__(self, root: type):
        self.root = root

    def section(self, section: type[T], values: Mapping[str, Any], prefix: str, chosen: str = "") -> T:
        """Build the section at the dotted ``prefix``; ``chosen`` is its key ``name`` if that selects the dataclass."""
        known = key_types(section)
        for name in values:
            if name not in known:
                hint = self._hint(str(name), list(known), prefix, chosen)
                raise UserError(f"unknown configuration key {prefix}{str(name)[:100]}: {hint}")
        return section(**{str(name): self._value(section, str(name), value, prefix) for name, value in values.items()})

    def _value(self, section: type, name: str, value: Any, prefix: str) -> Any:
        key, expected = f"{prefix}{name}", key_types(section)[name]
        if value is None:
            if expected.optional:
                return None
            raise UserError(f"{key} has no value: it must be {_words(expected, key, value)}")
        if (expected := expected.for_value(value)).is_section_list:
            return [self._list_item(expected.element, f"{key}[{number}]", item) for number, item in enumerate(value)]
        if not expected.is_section:
            return _convert_key(expected, key, value)
        if not isinstance(value, Mapping):
            raise UserError(f"{key}={shown(value)}: {key} must be {_words(expected, key, value)}")
        if expected.by_name is None:
            return self.section(expected.type, value, f"{key}.")
        (default,) = (field.default_factory for field in fields(section) if field.name == name)
        chosen = value.get("name", default().name)  # type: ignore[operator]
        if not isinstance(chosen, str) or chosen not in expected.by_name:
            close = difflib.get_close_matches(str(chosen), expected.by_name, n=1)
            hint = f": did you mean {close[0]}?" if close else ""
            raise UserError(f"{key}.name must be one of {', '.join(expected.by_name)}, not {shown(chosen)}{hint}")
        return self.section(expected.by_name[chosen], value, f"{key}.", chosen)

    def _list_item(self, expected: KeyType | None, key: str, value: Any) -> Any:
        """Build a section that is an element of a list; a text alone is its first key."""
        assert expected is not None
        first = next(iter(key_types(expected.type)))
        if not isinstance(value, str | Mapping):
            raise UserError(f"{key}={shown(value)}: {key} must be a section: write {{{first}: ..., ...}}")
        return self.section(expected.type, {first: value} if isinstance(value, str) else value, f"{key}.")

    def _hint(self, name: str, known: list[str], prefix: str, chosen: str) -> str:
        """Return what to write instead of an unknown key."""
        elsewhere = [key for key in keys(self.root, any_name=True) if key.split(".")[-1] == name]
        below = [key for key in elsewhere if key.startswith(prefix)]
        close = [below[0].removeprefix(prefix)] if below else difflib.get_close_matches(name, known, n=1)
        suggestion = f"did you mean {prefix}{close[0]}?" if close else ""
        if chosen:
            return f"{suggestion} ".lstrip() + f"{chosen} takes {', '.join(known[1:])}"
        if suggestion:
            return suggestion
        return f"did you mean {' or '.join(elsewhere[:3])}?" if elsewhere else f"known keys: {', '.join(known)}"


def _convert_key(expected: KeyType, key: str, value: Any) -> Any:
    """Convert the value of a key that is not a section.

    Raises:
        UserError: if the value does not fit; for an entry of a mapping it names that entry.
    """
    if expected.type is dict and isinstance(value, Mapping) and all(isinstance(name, str) for name in value):
        element = expected.element or KeyType(Any)  # "dict" alone does not say what its values are
        return {name: _convert_key(element, f"{key}.{name}", item) for name, item in value.items()}
    try:
        return convert(expected, value)
    except (ValueError, OverflowError):
        raise UserError(f"{key}={shown(value)}: {key} must be {_words(expected, key, value)}") from None


def convert(expected: KeyType, value: Any) -> Any:
    """Convert a plain ``value`` to the type of a key that is neither a section nor a mapping.

    Raises:
        ValueError, OverflowError: if it does not fit.
    """
    if expected.type is Any:
        return value
    if expected.type is list and expected.element is not None:
        if not isinstance(value, list | tuple):
            raise ValueError
        return [convert(expected.element, item) for item in value]
    if expected.type is bool and str(value).lower() in _BOOLEANS:
        return _BOOLEANS[str(value).lower()]
    if expected.type is str and isinstance(value, str | int | float):
        return str(value)
    if expected.type is int and isinstance(value, str | int) and not isinstance(value, bool):
        return int(value)
    if expected.type is float and isinstance(value, str | int | float) and not isinstance(value, bool):
        return float(value)
    raise ValueError


def _words(expected: KeyType, key: str, value: Any) -> str:
    """Complete "KEY must be ..." with the type of a key and an example of how to write it."""
    example = value if isinstance(value, str) else "..."
    if expected.by_name is not None:
        return f"a section: write {key}.name={example} and the like"
    if expected.is_section:
        return f"a section: write {key}.{next(iter(key_types(expected.type)))}=... and the like"
    if expected.type is dict:
        return f"a section: write {key}.NAME={example} for each of its names"
    if expected.type is list and expected.element is not None:
        if expected.element.type is list:
            return f"a list of lists: write {key}=[[..., ...], [..., ...]]"
        if isinstance(value, list):  # then one of its elements does not fit
            return f"a list of {_PLURALS[expected.element.type]}"
        return f"a list: write {key}=[{example}]"
    if expected.or_list is not None and (element := expected.or_list.element) is not None:
        return f"text or a list: write {key}=[{{{next(iter(key_types(element.type)))}: ..., ...}}, ...]"
    return _WORDS[expected.type]
