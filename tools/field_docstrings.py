"""The docstrings under the fields of dataclasses, which Python itself does not keep.

For `document_configuration.py`.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap


def _defining_class(owner: type, field: str) -> type:
    """The class among the bases of a dataclass that declares the field."""
    return next(base for base in owner.__mro__ if field in inspect.get_annotations(base))


def field_docstring(owner: type, field: str) -> str:
    """The docstring under a field of a dataclass, on one line; empty where there is none."""
    return _docstrings(_defining_class(owner, field)).get(field, "")


@functools.cache
def _docstrings(owner: type) -> dict[str, str]:
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
    assert isinstance(definition, ast.ClassDef)
    docstrings = {}
    for statement, following in zip(definition.body, definition.body[1:], strict=False):
        match statement, following:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                docstrings[name] = " ".join(text.split())
    return docstrings
