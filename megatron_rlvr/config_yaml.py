"""YAML as configurations read it: by the types of their keys, and otherwise by the core schema of YAML 1.2.

A key whose value is text receives the text as it is written, so `name: 0123` and `name=1e3` are not numbers. PyYAML and
OmegaConf follow YAML 1.1, in which 0123 is 83, 1:30 is 90 and `on` is a truth value. In an override the value of such a
key is everything after the equals sign: no comment, no list and no quotation mark within it means anything to YAML. The
job scripts read `run_directory=...` in the same way.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import yaml
from omegaconf import OmegaConf

from megatron_rlvr.checked_input import one_line, shown
from megatron_rlvr.config_schema import KeyType, key_types
from megatron_rlvr.errors import UserError

_UNTYPED = KeyType(Any)
_NULL = re.compile(r"~|null|Null|NULL|")
_BOOLEAN = re.compile(r"true|True|TRUE|false|False|FALSE")
# Leading zeros are no part of a number that a person writes: an untyped 0123 is an identifier and stays text.
_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
# Python refuses to convert more than 4300 digits.
_LONGEST_INTEGER = 4300
# A private character, which stands in for a number sign where YAML would begin a comment.
_NO_COMMENT = "\ue000"


def read_document(text: str, root: type) -> Any:
    """Return the values of a YAML document whose keys are those of the dataclass `root`; None if it is empty.

    Raises:
        yaml.YAMLError: if it is not YAML, or names a key twice.
    """
    node = yaml.compose(text, Loader=yaml.SafeLoader)
    return None if node is None else _construct(node, KeyType(root))


def read_overrides(texts: Iterable[str], root: type) -> Any:
    """Return the values of ``key=value`` overrides of a configuration as an OmegaConf tree.

    Args:
        root: the dataclass of the configuration, which says which keys are text.

    Raises:
        UserError: for the first override that cannot be read.
        OmegaConfBaseException: if keys contradict each other.
    """
    tree = OmegaConf.create({})
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise UserError(f"override {shown(text)} is not key=value: write for example optimizer.learning_rate=1e-6")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise UserError(f"override {shown(text)} is not UTF-8: choose another name") from None
        OmegaConf.update(tree, key, _read_value(text, value, type_of(key, root)))
    return tree


def _read_value(text: str, value: str, expected: KeyType) -> Any:
    quoted = value[:1] in ("'", '"')
    listed = expected.or_list is not None and value[:1] in ("[", "{")  # a mapping is refused with what to write
    if expected.type is str and not expected.choices and not quoted and not listed:
        return None if _NULL.fullmatch(value) else value
    try:
        node = yaml.compose(value, Loader=yaml.SafeLoader)
        whole = yaml.compose(value.replace("#", _NO_COMMENT), Loader=yaml.SafeLoader)
        read = None if node is None else _construct(node, expected)
        # What differs is a comment, which would silently take the rest of the value with it.
        commented = [text.replace("#", _NO_COMMENT) for text in _scalars(node)] != list(_scalars(whole))
    except (yaml.YAMLError, RecursionError) as error:
        reason = one_line(error)
        raise UserError(f"override {shown(text)}: its value is not valid YAML: {reason}") from None
    if commented:
        raise UserError(f"override {shown(text)} holds a YAML comment: put the text with # in quotes, or leave it out")
    return read


def _scalars(node: Any) -> Iterator[str]:
    """Yield the texts of all scalars in a node, in a tuple or in a list."""
    if isinstance(node, yaml.Node):
        node = node.value
    if isinstance(node, str):
        yield node
    else:
        for item in node or ():
            yield from _scalars(item)


def type_of(key: str, root: type) -> KeyType:
    """Return the type of a dotted key; an untyped one if there is no such key."""
    expected = KeyType(root)
    for name in re.split(r"[.\[\]]+", key.rstrip("]")):
        expected = _inner(expected, name)
    return expected


def _inner(expected: KeyType, name: str) -> KeyType:
    """Return the type of the value under `name` in a value of this type."""
    if expected.by_name is not None:  # the name may be chosen elsewhere; no two of the classes disagree about text
        types = [key_types(section) for section in expected.by_name.values()]
        return next((known[name] for known in types if name in known), _UNTYPED)
    if expected.is_section:
        return key_types(expected.type).get(name, _UNTYPED)
    if expected.or_list is not None:
        return expected.or_list.element or _UNTYPED
    return expected.element or _UNTYPED


def _construct(node: yaml.Node, expected: KeyType) -> Any:
    if isinstance(node, yaml.SequenceNode):
        return [_construct(item, _inner(expected, "")) for item in node.value]
    if isinstance(node, yaml.MappingNode):
        return _mapping(node, expected)
    text: str = node.value
    plain = not isinstance(node, yaml.ScalarNode) or node.style is None
    if plain and _NULL.fullmatch(text):
        return None
    if not plain or expected.type is str:
        return text
    return _core_schema(text)


def _mapping(node: yaml.MappingNode, expected: KeyType) -> Mapping[Any, Any]:
    own: dict[Any, Any] = {}
    merged: dict[Any, Any] = {}
    for key_node, value_node in node.value:
        if key_node.tag == "tag:yaml.org,2002:merge":
            sources = value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]
            for source in sources:
                if not isinstance(source, yaml.MappingNode):
                    raise yaml.YAMLError("<< must be followed by a mapping")
                merged = {**_mapping(source, expected), **merged}
            continue
        if not isinstance(key_node, yaml.ScalarNode):
            raise yaml.YAMLError(f"a key is not a word{key_node.start_mark}")
        key = _core_schema(key_node.value) if key_node.style is None else key_node.value
        if key in own:
            raise yaml.YAMLError(f"the key {key!r} is there twice{key_node.start_mark}")
        own[key] = _construct(value_node, _inner(expected, str(key)))
    return {**merged, **own}


def _core_schema(text: str) -> Any:
    """Return a plain scalar as null, a truth value, a number or text."""
    if _NULL.fullmatch(text):
        return None
    if _BOOLEAN.fullmatch(text):
        return text.lower() == "true"
    if _INTEGER.fullmatch(text) and len(text) < _LONGEST_INTEGER:
        return int(text)
    if _FLOAT.fullmatch(text) and not re.match(r"[-+]?0[0-9]", text):
        return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    return text
