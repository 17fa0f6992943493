"""Classes that a configuration chooses by name: their parameters as one dataclass, and errors that suggest a name."""

from __future__ import annotations

import copy
import dataclasses
import difflib
from collections.abc import Collection, Iterable, Mapping
from functools import partial
from typing import Any, TypeVar, get_type_hints

T = TypeVar("T")


def parameters_dataclass(
    base: type[T],
    name: str,
    chosen: type,
    parameters: Iterable[tuple[type, dataclasses.Field, str]],
    preset: Mapping[str, Any],
) -> type[T]:
    """A subclass of ``base`` with a field ``name`` and one field per parameter.

    Args:
        base: dataclass that all choices share.
        name: what the configuration calls the choice.
        chosen: the class that the name stands for. Its docstring becomes that of the subclass.
        parameters: of each parameter, the dataclass that declares it, its field there, and its key in a configuration.
            The metadata of the new field holds the first two as ``source``, for whoever documents it.
        preset: defaults that differ from those of the fields, by key.
    """
    described: list[tuple[str, Any, Any]] = [("name", str, dataclasses.field(default=name))]
    for source, declared, key in parameters:
        annotation = get_type_hints(source, include_extras=True)[declared.name]
        default, metadata = preset.get(key, declared.default), {"source": (source, declared.name)}
        if isinstance(default, list):
            made_field = dataclasses.field(default_factory=partial(copy.deepcopy, default), metadata=metadata)
        else:
            made_field = dataclasses.field(default=default, metadata=metadata)
        described.append((key, annotation, made_field))
    made = dataclasses.make_dataclass(f"{chosen.__name__}Parameters", described, bases=(base,))
    made.__doc__ = chosen.__doc__
    return made


def check_name(kind: str, name: str, choices: Collection[str]) -> None:
    """Raise ValueError unless ``name`` is one of ``choices``; ``kind`` is what is chosen, such as "schedule"."""
    if name not in choices:
        raise ValueError(f"{kind}: unknown name {name!r}{did_you_mean(name, choices)}; valid: {', '.join(choices)}")


def check_parameters(label: str, keys: Iterable[str], valid: Collection[str]) -> None:
    """Raise ValueError for the first of ``keys`` that is not a ``valid`` parameter; ``label`` begins the message."""
    for key in keys:
        if key not in valid:
            raise ValueError(f"{label}: unknown parameter {key!r}{did_you_mean(key, valid)}; valid: {', '.join(valid)}")


def did_you_mean(word: str, choices: Collection[str]) -> str:
    """`` (did you mean 'choice'?)`` for the choice that is closest to ``word``; empty when none is close."""
    near = difflib.get_close_matches(word, choices, n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""
