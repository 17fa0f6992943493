"""Untrusted JSON: what is refused, in one line that says what was found, and what is read."""

from __future__ import annotations

import json
import random

import pytest

from megatron_rlvr.checked_input import (
    DEPTH,
    InvalidInputError,
    describe,
    field,
    parse_json,
    parse_object,
    read_json,
)
from megatron_rlvr.checked_yaml import read_yaml
from megatron_rlvr.errors import UserError


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b"", "not valid JSON"),
        (b'{"a": 1', "not valid JSON"),
        (b'{"a": 1} {"b": 2}', "not valid JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "an integer of more than 4300 digits"),
        (b'{"a": NaN}', "NaN, which is not a number"),
        (b"[-Infinity]", "-Infinity, which is not a number"),
        (b"[1e999]", "the number 1e999, which is too large"),
        (b"[-" + b"9" * 400 + b".0]", "which is too large"),
        (b'{"a": "\\ud800"}', "a surrogate"),
        (b'{"\\uDFFF": 1}', "a surrogate"),
        (b'{"a": 1, "a": 2}', "the key 'a' twice"),
        (b'{"a": {"b": 1, "c": 2, "b": 1}}', "the key 'b' twice"),
        (b"[" * 100_000, "nested deeper than"),
        (b"[" * DEPTH + b"[]" + b"]" * DEPTH, "nested deeper than"),
        (b'{"a":' * DEPTH + b"{}" + b"}" * DEPTH, "nested deeper than"),
        (b'"\xff"', "not UTF-8 text (byte 1)"),
        ('{"a": 1}'.encode("utf-16"), "not UTF-8 text"),
        (b"[" + b"1," * 600 + b"1]", "more than the 1000 that are read"),
    ],
)
def test_refused(data: bytes, found: str) -> None:
    with pytest.raises(InvalidInputError) as error:
        parse_json(data, limit=1000 if b"1,1,1" in data else 10**6)
    assert found in str(error.value) and "\n" not in str(error.value)


def test_accepted() -> None:
    for value in (None, True, 10**400, -1.5e300, 5e-324, "\U0001f600 é", [[]], {"a": {"b": [1, None]}}):
        data = json.dumps(value).encode()
        assert parse_json(data) == value  # json.dumps writes characters beyond 16 bits as pairs of surrogates
        assert parse_json(b"\xef\xbb\xbf" + data) == value
    deep = b"[" * DEPTH + b"]" * DEPTH
    assert parse_json(deep) == json.loads(deep)
    assert parse_json(b"[1e-999, 1E+10]") == [0.0, 1e10]


def test_random_bytes_and_mutations_are_parsed_or_refused() -> None:
    generator = random.Random(0)
    start = json.dumps({"text": "a\u00e9\U0001f600", "list": [1, 2.5, None, {"k": [True]}], "n": -3e-5}).encode()
    parsed = 0
    for _ in range(3000):
        data = bytearray(start)
        for _ in range(generator.randint(1, 3)):
            data[generator.randrange(len(data))] = generator.choice(b'0eE-+."\\u[]{},:x \xff')
        try:
            json.dumps(parse_json(bytes(data)), allow_nan=False, ensure_ascii=False).encode()
            parsed += 1
        except InvalidInputError as error:
            assert "\n" not in str(error)
    assert 100 < parsed < 2900


def test_fields() -> None:
    record = {"n": 3, "x": 2, "text": "a", "yes": True, "huge": 10**400, "null": None}
    assert field(record, "n", int, at_least=0) == 3
    assert field(record, "x", float) == 2.0 and isinstance(field(record, "x", float), float)
    assert field(record, "absent", int, default=7) == 7
    assert field(record, "yes", bool) is True
    for name, kind, limits, found in [
        ("absent", int, {}, "no 'absent'"),
        ("text", int, {}, "'text' is str 'a' instead of an integer"),
        ("yes", int, {}, "'yes' is bool True instead of an integer"),
        ("null", str, {}, "'null' is NoneType None instead of text"),
        ("n", int, {"at_most": 2}, "'n' is int 3, which is out of range"),
        ("huge", float, {}, "which is out of range"),
        ("huge", int, {"at_most": 2**63}, "which is out of range"),
    ]:
        with pytest.raises(InvalidInputError) as error:
            field(record, name, kind, **limits)
        assert found in str(error.value)
    with pytest.raises(InvalidInputError, match=r"found list \[\] instead of an object with 'n'"):
        field([], "n", int)


def test_description_is_one_short_line() -> None:
    for value in (10**5000, "line\n" * 100, [[1]] * 100, b"\x00" * 100):
        assert "\n" not in describe(value) and len(describe(value)) < 60


def test_files(tmp_path) -> None:
    path = tmp_path / "record.json"
    with pytest.raises(UserError, match=r"record.json cannot be read \(No such file or directory\): write it again"):
        read_json(path, remedy="write it again")
    path.write_text("[1]")
    with pytest.raises(UserError, match=r"found list \[1\] instead of an object"):
        read_json(path, remedy="write it again")
    path.write_text('{"a": 1}')
    assert read_json(path, remedy="") == {"a": 1} == parse_object(path.read_bytes())
    with pytest.raises(UserError, match="more than the 4 that are read"):
        read_json(path, limit=4, remedy="")
    with pytest.raises(UserError, match="Is a directory"):
        read_json(tmp_path, remedy="")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (b"a: [1", "is not valid YAML, so it is not a configuration: "),
        (b"- 1", "holds a list"),
        (b"a: \xff", "is not a configuration"),
        (b"a: &a [*a]", "nested deeper than"),
        (b"a: " + b"[" * 500 + b"]" * 500, "nested deeper than"),
        (b"a: " + b"[" * 2000 + b"]" * 2000, "nested deeper than"),
        (b"a: " + b"9" * 5000, "is not a configuration"),
        (b"a: !!python/object/apply:os.system [false]", "is not a configuration"),
        (
            b"a0: &a0 [1, 1]\n" + b"".join(b"a%d: &a%d [*a%d, *a%d]\n" % (n, n, n - 1, n - 1) for n in range(1, 30)),
            "expand",
        ),
    ],
)
def test_yaml_that_is_refused(tmp_path, text: bytes, found: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(text)
    with pytest.raises(UserError) as error:
        read_yaml(path)
    assert found in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 500


def test_yaml_with_aliases_is_read(tmp_path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("a: &x {b: 1}\nc: *x\nd: ${a.b}\n")
    assert read_yaml(path) == {"a": {"b": 1}, "c": {"b": 1}, "d": 1}
