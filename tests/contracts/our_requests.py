"""What this project sends to SGLang, read from its own source: requests by endpoint, arguments of servers, tags."""

from __future__ import annotations

import ast
import functools
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from tests.processes import ROOT

CLIENT = ROOT / "megatron_rlvr" / "rollout" / "engines" / "sglang"


def _functions() -> Iterator[tuple[Path, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for path in sorted(CLIENT.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield path, node


def _keys(node: ast.AST) -> set[str]:
    """Constant keys of all dictionaries in an expression."""
    return {
        key.value
        for dictionary in ast.walk(node)
        if isinstance(dictionary, ast.Dict)
        for key in dictionary.keys
        if isinstance(key, ast.Constant) and isinstance(key.value, str)
    }


def _bound_keys(function: ast.AST, name: str) -> set[str]:
    """Keys of the dictionaries that a function assigns to, or merges into, the variable `name`."""
    keys: set[str] = set()
    for node in ast.walk(function):
        targets: list[ast.expr] = []
        if isinstance(node, ast.Assign):
            targets = node.targets
        elif isinstance(node, ast.AugAssign | ast.AnnAssign):
            targets = [node.target]
        for target in targets:
            if isinstance(target, ast.Name) and target.id == name and node.value is not None:  # type: ignore[union-attr]
                keys |= _keys(node.value)  # type: ignore[union-attr, arg-type]
            if isinstance(target, ast.Subscript) and ast.unparse(target.value) == name:
                keys |= {target.slice.value} if isinstance(target.slice, ast.Constant) else set()
    return keys


def endpoints() -> set[str]:
    """Paths of all requests to SGLang."""
    text = "".join(path.read_text() for path in CLIENT.rglob("*.py") if path.name != "copy_service.py")
    paths = set(re.findall(r'"(/[a-z_]{3,})"', text)) | set(re.findall(r"\}(/[a-z_]{3,})[\"']", text))
    return {path for path in paths if not Path(path).exists()}


@functools.cache
def bodies() -> dict[str, set[str]]:
    """Keys of the bodies of requests, by path."""
    found: dict[str, set[str]] = defaultdict(set)
    extra = fields_with_every_bucket()
    for _, function in _functions():
        constants = {
            target.id: value.value
            for node in ast.walk(function)
            if isinstance(node, ast.Assign)
            for names, values in [(node.targets[0], node.value)]
            for target, value in (
                zip(names.elts, values.elts, strict=True)
                if isinstance(names, ast.Tuple) and isinstance(values, ast.Tuple)
                else [(names, values)]
            )
            if isinstance(target, ast.Name) and isinstance(value, ast.Constant)
        }
        for call in (node for node in ast.walk(function) if isinstance(node, ast.Call)):
            name = call.func.attr if isinstance(call.func, ast.Attribute) else ""
            if name not in ("command", "request", "_command_all") or not call.args:
                continue
            arguments = call.args[1:] if name == "request" else call.args
            path = arguments[0]
            where = path.value if isinstance(path, ast.Constant) else constants.get(ast.unparse(path))
            if not isinstance(where, str) or not where.startswith("/") or len(arguments) < 2:
                continue
            body = arguments[2] if name == "request" and len(arguments) > 2 else arguments[1]
            found[where] |= _keys(body)
            if isinstance(body, ast.Name):
                found[where] |= _bound_keys(function, body.id)
                found[where] |= extra if "**fields" in ast.unparse(function) else set()
    return found


def fields_with_every_bucket() -> set[str]:
    """Keys that an update adds to the request of each bucket of weights."""
    text = ast.parse((CLIENT / "weight_sync" / "update.py").read_text())
    return {key for key in _keys(text) if key in ("weight_version", "flush_cache")}


def server_arguments() -> set[str]:
    """Arguments of `sglang.launch_server` in the client's source, in example configurations and job scripts."""
    found: set[str] = set()
    for path in (CLIENT / "server.py", CLIENT / "launch_with_key.py"):
        text = path.read_text()
        found |= {word.replace("-", "_") for word in re.findall(r'"--([a-z][a-z-]+)"', text)}
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and path.name == "server.py":
                found |= _bound_keys(node, "defaults") | _bound_keys(node, "self.arguments")
    layout = (CLIENT / "launch_arguments.py").read_text()
    for names in re.findall(r"size\(((?:\"\w+\"(?:, )?)+)\)", layout):
        found |= set(re.findall(r'"(\w{3,})"', names))  # not abbreviations, such as tp
    found |= set(re.findall(r'values\.get\("(\w+)"\)', layout))
    for folder, pattern in (("examples", "*"), ("docs", "*.md")):
        for path in (ROOT / folder).rglob(pattern):
            if path.suffix in (".sbatch", ".sh", ".md", ".yaml"):
                found |= set(re.findall(r"\bsglang\.server\.([a-z_]+)=", path.read_text()))
    return found


def memory_tags() -> set[str]:
    """Tags of memory that the client names when servers resume."""
    text = "".join(path.read_text() for path in CLIENT.rglob("*.py"))
    return {tag for words in re.findall(r"resume_memory\(([^)]*)\)", text) for tag in re.findall(r'"(\w+)"', words)}
