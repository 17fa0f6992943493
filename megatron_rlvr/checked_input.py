"""Untrusted input becomes a checked value: JSON of files and replies, and the types and ranges of its fields.

Files come from downloads, other programs and damaged disks; replies come from servers. Everything that this project
reads as JSON goes through `parse_json`, which accepts less than the standard library does:

- not more bytes than the caller expects, and no deeper nesting than `DEPTH`
- UTF-8 only, with or without a byte order mark, and no surrogates, which no encoder accepts
- no ``NaN``, ``Infinity``, or numbers that overflow to them, and no integers of thousands of digits
- no key twice in an object, because readers disagree on which one counts

Errors are `InvalidInputError`, which says what was found. Readers of files raise it as a UserError that names the file.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from megatron_rlvr.errors import UserError, truncated

T = TypeVar("T")

FILE_BYTES = 256 * 2**20
"""Default maximum size of a JSON file, in bytes. The tokenizer files of large vocabularies have about 20 MB."""
DEPTH = 64
"""Maximum nesting of lists and objects. Deeper values overflow the stack of code that copies or pickles them."""

_LARGE_EXPONENTS = re.compile(rb"e\+?[0-9]{3}"), re.compile(rb"E\+?[0-9]{3}")  # apart: a literal prefix is fast
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


class InvalidInputError(ValueError):
    """Input that is not what it should be; the text is one line that says what was found."""


def parse_json(data: bytes, *, limit: int = FILE_BYTES, finite: bool = True) -> Any:
    """Parse JSON.

    Args:
        data: the encoded text.
        limit: maximum number of bytes.
        finite: whether to refuse numbers such as 1e999, which become infinite.

    Raises:
        InvalidInputError: if `data` is too long, is not JSON, or has values that the module docstring excludes.
    """
    if len(data) > limit:
        raise InvalidInputError(f"{len(data)} bytes, more than the {limit} that are read")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidInputError(f"not UTF-8 text (byte {error.start})") from None
    parse_float = _finite_float if finite and _may_overflow(data) else None
    try:
        value = json.loads(
            text, parse_constant=_refuse_constant, parse_float=parse_float, object_pairs_hook=_without_duplicates
        )
    except InvalidInputError:
        raise
    except RecursionError:
        raise InvalidInputError(f"not valid JSON (nested deeper than {DEPTH} levels)") from None
    except json.JSONDecodeError as error:
        raise InvalidInputError(f"not valid JSON ({error})") from None
    except ValueError:  # Python refuses to convert integers of more than 4300 digits
        raise InvalidInputError("an integer of more than 4300 digits") from None
    if _SURROGATE.search(data) and _has_surrogate(text, value):
        raise InvalidInputError("a surrogate (\\ud800 to \\udfff) without its pair, which is not a character")
    if _may_be_deep(data):
        _check_depth(value)
    return value


def read_json(path: Path, *, limit: int = FILE_BYTES, remedy: str) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Args:
        path: the file.
        limit: maximum size of the file, in bytes.
        remedy: the end of the error: what to do instead.

    Raises:
        UserError: if the file cannot be read, or is not a JSON object.
    """
    try:
        return parse_object(read_bytes(path, limit), limit=limit)
    except (OSError, InvalidInputError) as error:
        reason = (error.strerror or error) if isinstance(error, OSError) else error
        raise UserError(f"{path} cannot be read ({reason}): {remedy}") from error


def read_bytes(path: Path, limit: int = FILE_BYTES) -> bytes:
    """Read a file, up to one byte more than `limit`; raises OSError."""
    with path.open("rb") as file:
        return file.read(limit + 1)


def one_line(error: BaseException) -> str:
    """Return the text of an error of OmegaConf or of a parser on one line."""
    return truncated(" ".join(str(error).split("\n    full_key")[0].split()), 300)


def parse_object(data: bytes, *, limit: int = FILE_BYTES) -> dict[str, Any]:
    """Parse a JSON object; raises InvalidInputError like `parse_json`, and if the value is not an object."""
    value = parse_json(data, limit=limit)
    if not isinstance(value, dict):
        raise InvalidInputError(f"found {describe(value)} instead of an object")
    return value


def field(
    record: Any,
    name: str,
    kind: type[T],
    *,
    at_least: float = -math.inf,
    at_most: float = math.inf,
    default: T | None = None,
) -> T:
    """Return the field `name` of an object, checked.

    Args:
        record: the object; anything else is an error.
        name: key of the field.
        kind: bool, int, float, str, list or dict. An integer is also a float, and true is not an integer.
        at_least, at_most: the allowed range of a number.
        default: returned if the object has no such field; None makes the field required.

    Raises:
        InvalidInputError: if the field is missing, has another type, or is not a finite number in the range.
    """
    if not isinstance(record, Mapping):
        raise InvalidInputError(f"found {describe(record)} instead of an object with {name!r}")
    if name not in record:
        if default is not None:
            return default
        raise InvalidInputError(f"no {name!r}")
    return checked(record[name], kind, name, at_least=at_least, at_most=at_most)


def checked(value: Any, kind: type[T], name: str, *, at_least: float = -math.inf, at_most: float = math.inf) -> T:
    """Return `value` if it is a `kind` in the range, as `field` does; `name` is for the error."""
    right = isinstance(value, int | float if kind is float else kind)
    if not right or (isinstance(value, bool) and kind is not bool):
        raise InvalidInputError(f"{name!r} is {describe(value)} instead of {_WORDS[kind]}")
    if kind in (int, float):
        if not at_least <= value <= at_most or not math.isfinite(float_or_inf(value)):
            raise InvalidInputError(f"{name!r} is {describe(value)}, which is out of range")
        return kind(value)  # type: ignore[call-arg]
    return value


def float_or_inf(value: float) -> float:
    """Convert a number to a float; integers that are too large become infinite."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def describe(value: Any) -> str:
    """Return the type and the beginning of a value on one line, for errors."""
    return f"{type(value).__name__} {shown(value, 40)}"


def shown(value: Any, length: int = 200) -> str:
    """Return the beginning of the repr of a value on one line, for errors."""
    try:
        text = repr(value).replace("\n", " ")
    except (ValueError, RecursionError):  # an integer of thousands of digits, or deep nesting
        text = "..."
    return truncated(text, length)


_WORDS: dict[type, str] = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "text",
    list: "a list",
    dict: "an object",
}


def _refuse_constant(name: str) -> Any:
    raise InvalidInputError(f"{name}, which is not a number in JSON")


def _may_overflow(data: bytes) -> bool:
    """Whether a number may be too large for a float: an exponent of three digits, or 300 digits in a row.

    300 digits fill one of the blocks of 150 bytes. This and `_may_be_deep` take a fifth of the time of the parser.
    """
    return any(pattern.search(data) for pattern in _LARGE_EXPONENTS) or any(
        data[start : start + 150].isdigit() for start in range(0, len(data) - 149, 150)
    )


def _may_be_deep(data: bytes) -> bool:
    """Whether values may be nested deeper than `DEPTH`: pairs of brackets remain after as many passes.

    Brackets in texts count as well, so the answer may be a false yes.
    """
    brackets = data.translate(None, _NOT_BRACKETS)
    for _ in range(DEPTH):
        if not brackets:
            return False
        inner, brackets = brackets, brackets.replace(b"[]", b"").replace(b"{}", b"")
        if brackets == inner:
            break
    return bool(brackets)


def _finite_float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise InvalidInputError(f"the number {text[:40]}, which is too large")
    return value


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise InvalidInputError(f"the key {name[:40]!r} twice in an object")
            seen.add(name)
    return values


def _has_surrogate(text: str, value: Any) -> bool:
    """Whether a text in `value` has a surrogate. Python decodes an escaped pair to one character."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    except RecursionError:
        raise InvalidInputError(f"not valid JSON (nested deeper than {DEPTH} levels)") from None
    return False


def _check_depth(value: Any) -> None:
    level, depth = [value], 0
    while level := [
        item
        for container in level
        for item in (container.values() if isinstance(container, dict) else container)
        if isinstance(item, list | dict)
    ]:
        depth += 1
        if depth >= DEPTH:
            raise InvalidInputError(f"not valid JSON (nested deeper than {DEPTH} levels)")
