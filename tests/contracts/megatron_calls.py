"""What megatron-core takes from Transformer Engine, read from its source: without a GPU, it cannot import it."""

from __future__ import annotations

import ast
import functools
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from packaging.version import Version

from megatron_rlvr.doctor import pins

# The configurations of this project reach these files; others are of models and tools that it does not use.
FILES = (
    "extensions/transformer_engine.py",
    "extensions/transformer_engine_spec_provider.py",
    "optimizer/__init__.py",
    "optimizer/optimizer.py",
    "optimizer/clip_grads.py",
    "optimizer/distrib_optimizer.py",
    "fp8_utils.py",
)


@functools.cache
def source(file: str) -> ast.Module:
    """The syntax tree of a file of megatron-core, without the branches for other versions of Transformer Engine."""
    spec = importlib.util.find_spec("megatron.core")
    assert spec is not None and spec.submodule_search_locations
    path = Path(spec.submodule_search_locations[0]) / file
    return _OneVersion(Version(pins("gpu")["transformer-engine"])).visit(ast.parse(path.read_text()))


class _OneVersion(ast.NodeTransformer):
    """Replaces an `if` whose condition depends on Transformer Engine's version alone by the branch that is taken."""

    def __init__(self, version: Version):
        self.names = {
            "HAVE_TE": True,
            "PkgVersion": Version,
            "get_te_version": lambda: version,
            "is_te_min_version": lambda wanted, check_equality=True: (
                version >= Version(wanted) if check_equality else version > Version(wanted)
            ),
        }

    def visit_If(self, node: ast.If) -> ast.AST | list[ast.stmt]:
        self.generic_visit(node)
        try:
            taken = eval(compile(ast.Expression(node.test), "", "eval"), {"__builtins__": {}}, self.names)
        except Exception:  # it depends on something else
            return node
        return (node.body if taken else node.orelse) or ast.Pass()


def _guarded(tree: ast.Module) -> set[ast.AST]:
    """Nodes in the body of a `try`: megatron-core goes on without what they import."""
    tries = [node for node in ast.walk(tree) if isinstance(node, ast.Try)]
    return {node for attempt in tries for statement in attempt.body for node in ast.walk(statement)}


@functools.cache
def imported_names() -> dict[str, bool]:
    """Dotted names below ``transformer_engine.`` that megatron-core reads; True where it goes on without one."""
    names: dict[str, bool] = {}
    for file in FILES:
        tree = source(file)
        guarded = _guarded(tree)
        for node in ast.walk(tree):
            found: list[str] = []
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("transformer_engine"):
                found = [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Attribute) and (name := ast.unparse(node)).startswith("te.pytorch."):
                found = [f"transformer_engine.{name[len('te.') :]}"]
            for name in found:
                names[name] = names.get(name, True) and node in guarded
    # Of `te.pytorch.ops.Linear`, also `te.pytorch.ops` is read; the longer name says it all.
    return {name: guarded for name, guarded in names.items() if not any(o.startswith(f"{name}.") for o in names)}


def names_behind(function: str) -> set[str]:
    """Names of Transformer Engine in the statement that defines `function` for the rest of megatron-core."""
    for statement in source(FILES[0]).body:
        defines = {node.name for node in ast.walk(statement) if isinstance(node, ast.FunctionDef)}
        defines |= {
            node.id for node in ast.walk(statement) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
        }
        imports = [node for node in ast.walk(statement) if isinstance(node, ast.ImportFrom)]
        defines |= {alias.asname or alias.name for node in imports for alias in node.names}
        if function in defines and any("transformer_engine" in (node.module or "") for node in imports):
            return {
                f"{node.module}.{alias.name}"
                for node in imports
                if (node.module or "").startswith("transformer_engine")
                for alias in node.names
            }
    return set()


@dataclass(frozen=True)
class Call:
    """A call of megatron-core: the callable of Transformer Engine, its method if it is a class, keyword arguments."""

    name: str
    method: str | None
    keywords: frozenset[str]


def calls() -> Iterator[Call]:
    """Calls of Transformer Engine in the file through which megatron-core builds and runs its layers."""
    tree = source(FILES[0])
    imported = {
        alias.asname or alias.name: f"{node.module}.{alias.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("transformer_engine")
        for alias in node.names
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in imported:
            yield Call(imported[node.func.id], None, _keywords(node))
        if not isinstance(node, ast.ClassDef):
            continue
        bases = [ast.unparse(base) for base in node.bases if ast.unparse(base).startswith("te.pytorch.")]
        for method in (m for m in node.body if isinstance(m, ast.FunctionDef) and bases):
            for call in (c for c in ast.walk(method) if isinstance(c, ast.Call)):
                target = ast.unparse(call.func)
                if target in ("super().__init__", "super().forward"):
                    extra = _subscripts(method) if target.endswith("__init__") else frozenset[str]()
                    name = f"transformer_engine.{bases[0][len('te.') :]}"
                    yield Call(name, target.rpartition(".")[2], _keywords(call) | extra)


def _keywords(call: ast.Call) -> frozenset[str]:
    return frozenset(keyword.arg for keyword in call.keywords if keyword.arg)


def _subscripts(method: ast.FunctionDef) -> frozenset[str]:
    """Keys that a method sets in `extra_kwargs`, which it passes on."""
    return frozenset(
        node.slice.value
        for node in ast.walk(method)
        if isinstance(node, ast.Subscript)
        and isinstance(node.ctx, ast.Store)
        and ast.unparse(node.value) == "extra_kwargs"
        and isinstance(node.slice, ast.Constant)
        and isinstance(node.slice.value, str)
    )
