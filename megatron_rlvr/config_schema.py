"""Types, bounds and choices of configuration keys, read from the annotations of dataclass fields.

A section of the configuration is a plain dataclass. Its annotations describe the allowed values (``PositiveInt``,
``Literal["a", "b"]``, ``list[str]``, another section). `config_reader` converts values to these types, this module
checks them, and `tools/document_configuration.py` writes the reference page. A section may have a method ``check()``
that refuses combinations of its keys.

The sections are plain dataclasses rather than pydantic models: the suggestions of `config_reader` would have to be
built on top of pydantic's errors anyway, and `megatron_rlvr.control`, whose schedules are sections, must depend on
torch alone.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, Protocol, Union, get_args, get_origin, get_type_hints

from megatron_rlvr.checked_input import shown
from megatron_rlvr.errors import UserError

REQUIRED = "???"
"""Marks a key without a default: the configuration must set it."""


class Limits(Protocol):
    """The allowed range of a number, in ``Annotated[float, limits]``.

    There are two implementations: `Bounds` below, and ``Within`` in `megatron_rlvr.control`, which imports no other
    package of this project.
    """

    def allow(self, value: float) -> bool:
        """Whether ``value`` is in the range."""
        ...

    def requirement(self, value: float) -> str:
        """Complete "must be ..." for a ``value`` outside the range."""
        ...


@dataclasses.dataclass(frozen=True)
class Bounds:
    """A range from ``at_least`` or ``above`` to ``at_most`` or ``below``; infinity is allowed only if ``infinite``.

    Values above ``cap`` are refused as well: nobody means them, and they overflow timers, tensors or memory. ``reason``
    ends the error for a value outside the range.
    """

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    cap: float | None = None
    infinite: bool = False
    reason: str = ""

    def allow(self, value: float) -> bool:
        """Whether ``value`` is within the bounds; NaN is not."""
        return (
            value == value  # NaN is not; math.isnan overflows for integers of hundreds of digits
            and (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
            and (self.cap is None or value <= self.cap or (self.infinite and value == math.inf))
        )

    def requirement(self, value: float) -> str:
        """Complete "must be ..." for a ``value`` outside the bounds."""
        too_large = self.cap is not None and value > self.cap
        return self.cap_words if too_large else str(self)

    @property
    def cap_words(self) -> str:
        """``at most CAP``, for errors and documentation."""
        return f"at most {_number(self.cap)}"

    def __str__(self) -> str:
        lower = self.at_least if self.above is None else self.above
        upper = self.at_most if self.below is None else self.below
        if upper is None:
            return f"greater than {_number(lower)}" if self.above is not None else f"at least {_number(lower)}"
        left, right = "[("[self.above is not None], "])"[self.below is not None]
        return f"in {left}{_number(lower)}, {_number(upper)}{right}"


def _number(value: float | None) -> str:
    if isinstance(value, int) and value >= 2**16 and value & (value - 1) == 0:
        return f"2**{value.bit_length() - 1}"
    return str(value) if isinstance(value, int) else f"{value:g}"


LONGEST_TEXT = 4096
"""Longest text, in characters; Linux allows no longer path."""
LARGEST_INT = 2**31 - 1
"""Cap of whole numbers: counts and sizes become 32-bit integers in libraries."""

PositiveInt = Annotated[int, Bounds(above=0, cap=LARGEST_INT)]
NonNegativeInt = Annotated[int, Bounds(at_least=0, cap=LARGEST_INT)]
PositiveFloat = Annotated[float, Bounds(above=0, cap=1e6)]
NonNegativeFloat = Annotated[float, Bounds(at_least=0, cap=1e6)]
Seconds = Annotated[float, Bounds(at_least=1e-3, cap=30 * 86400)]
"""A deadline. Timers round shorter ones to 0, which disables some of them, and overflow with much longer ones."""
Temperature = Annotated[float, Bounds(at_least=1e-3, cap=1e3)]
"""A divisor of logits. Smaller ones overflow in float32 and half precision."""
Fraction = Annotated[float, Bounds(at_least=0, at_most=1)]


@dataclasses.dataclass(frozen=True)
class ByName:
    """Marks a section whose key ``name`` selects the dataclass of its other keys."""

    sections: Mapping[str, type]


@dataclasses.dataclass(frozen=True)
class KeyType:
    """Type and constraints of a key.

    Attributes:
        type: bool, int, float, str, list, dict, or the dataclass of a section.
        optional: whether null is allowed.
        limits: the allowed range of a number; None if any number is allowed.
        choices: the allowed texts; empty if any text is allowed.
        element: type of the elements of a list, or of the values of a dict.
        or_list: the list that may take the place of a text.
        by_name: the dataclasses of a section that its key ``name`` selects from.
    """

    type: Any
    optional: bool = False
    limits: Limits | None = None
    choices: tuple[str, ...] = ()
    element: KeyType | None = None
    or_list: KeyType | None = None
    by_name: Mapping[str, type] | None = None

    @property
    def is_section(self) -> bool:
        """Whether the key is a section."""
        return dataclasses.is_dataclass(self.type)

    def for_value(self, value: Any) -> KeyType:
        """Return the type that ``value`` must have: of a key that takes a text or a list, the one or the other."""
        return self.or_list if self.or_list is not None and isinstance(value, list | tuple) else self

    @property
    def is_section_list(self) -> bool:
        """Whether the key is a list of sections."""
        return self.type is list and self.element is not None and self.element.is_section

    def problem(self, value: Any) -> str | None:
        """Complete "KEY must ..." for a ``value`` of the right type that is not allowed; None if it is allowed."""
        if value is None:
            return None
        if self.choices and value not in self.choices:
            return f"be one of {', '.join(self.choices)}, not {shown(value)}"
        if self.limits is not None:
            if isinstance(value, float) and math.isinf(value) and not getattr(self.limits, "infinite", False):
                return f"be a finite number, not {value}"
            if not self.limits.allow(value):
                reason = getattr(self.limits, "reason", "")
                return f"be {self.limits.requirement(value)}, not {shown(value)}" + (f": {reason}" if reason else "")
        if self.type is str and ("\0" in value or len(value) > LONGEST_TEXT):
            return f"be text of at most {LONGEST_TEXT} characters, without the character NUL, not {shown(value)}"
        if self.type in (list, dict) and self.element is not None:
            items = value.values() if self.type is dict else value
            return next((problem for item in items if (problem := self.element.problem(item))), None)
        return None


def key_type(annotation: Any) -> KeyType:
    """Return the `KeyType` of a field with this (evaluated) annotation."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        inner = key_type(arguments[0])
        for mark in arguments[1:]:
            if isinstance(mark, ByName):
                inner = dataclasses.replace(inner, by_name=mark.sections)
            else:
                inner = dataclasses.replace(inner, limits=mark)
        return inner
    if origin in (Union, types.UnionType):
        inner, *lists = (key_type(argument) for argument in arguments if argument is not type(None))
        return dataclasses.replace(inner, optional=type(None) in arguments, or_list=next(iter(lists), None))
    if origin is Literal:
        return KeyType(str, choices=arguments)
    if origin in (list, Sequence):
        return KeyType(list, element=key_type(arguments[0]))
    if origin in (dict, Mapping):
        return KeyType(dict, element=key_type(arguments[1]))
    return KeyType(annotation)


def key_types(section: type) -> dict[str, KeyType]:
    """Return the `KeyType` of every field of the dataclass ``section``, by name."""
    return _key_types(section)


@functools.cache
def _key_types(section: Any) -> dict[str, KeyType]:
    annotations = get_type_hints(section, include_extras=True)
    return {field.name: key_type(annotations[field.name]) for field in dataclasses.fields(section) if field.init}


def keys(section: type, prefix: str = "", *, any_name: bool = False) -> Iterator[str]:
    """Yield the dotted keys of a section and of its subsections.

    Args:
        section: the dataclass of the section.
        prefix: what precedes its keys.
        any_name: include the parameters of a section that its key ``name`` selects, of every name.
    """
    for name, expected in key_types(section).items():
        yield (key := f"{prefix}{name}")
        if expected.by_name is not None:
            chosen = expected.by_name.values() if any_name else ()
            yield from dict.fromkeys(f"{key}.{parameter}" for kind in chosen for parameter in key_types(kind))
        elif expected.is_section:
            yield from keys(expected.type, f"{key}.", any_name=any_name)


def names_key(entries: Iterable[str], key: str) -> bool:
    """Whether one of the entries, keys or sections, is a dotted key or holds it."""
    return any(key == entry or key.startswith(f"{entry}.") for entry in entries)


def check_values(section: Any, prefix: str = "") -> None:
    """Check the values of a section and its subsections against bounds and choices, and call their ``check`` methods.

    Raises:
        UserError: for the first value that is not allowed; names its dotted key.
    """
    required = {field.name for field in dataclasses.fields(section) if field.default == REQUIRED}
    for name, expected in key_types(type(section)).items():
        key, value = f"{prefix}{name}", getattr(section, name)
        if name in required and value in (None, "", REQUIRED):
            raise UserError(
                f"{key} is not set: set it in the configuration file, or write {key}=... on the command line"
            )
        if expected.is_section:
            check_values(value, f"{key}.")
        elif (expected := expected.for_value(value)).is_section_list:
            for number, item in enumerate(value):
                check_values(item, f"{key}[{number}].")
        elif problem := expected.problem(value):
            raise UserError(f"{key} must {problem}")
    if hasattr(section, "check"):
        section.check()


def to_dict(section: Any) -> dict[str, Any]:
    """Convert a section to plain values for YAML.

    For a section that its key ``name`` selects, only the parameters that differ from their defaults are included.
    """
    values: dict[str, Any] = {}
    for name, expected in key_types(type(section)).items():
        value = getattr(section, name)
        if expected.by_name is not None:
            default = expected.by_name[value.name]()
            changed = {k: v for k, v in dataclasses.asdict(value).items() if v != getattr(default, k)}
            values[name] = {"name": value.name} | changed
        else:
            sections = expected.for_value(value).is_section_list
            values[name] = to_dict(value) if expected.is_section else list(map(to_dict, value)) if sections else value
    return values


def describe_sections(section: type) -> str:
    """Return one line per section of a configuration: its key and the first line of its dataclass's docstring."""
    sections = {name: expected.type for name, expected in key_types(section).items() if expected.is_section}
    width = max(map(len, sections))
    first_lines = {name: (kind.__doc__ or "").splitlines()[0] for name, kind in sections.items()}
    return "\n".join(f"  {name:{width}}  {line.rstrip('.').replace('``', '')}" for name, line in first_lines.items())
