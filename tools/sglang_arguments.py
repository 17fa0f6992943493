"""The arguments of ``sglang.launch_server``, read from SGLang's sources for ``record_contracts.py``."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Mapping

ArgumentKind = str | list[str]
"""What follows an argument; see ``RECORDED`` of `megatron_rlvr.rollout.engines.sglang.server_arguments`."""

_FIELDS = "sglang/srt/arg_groups/fields/"
_CHOICES = "sglang/srt/arg_groups/choices.py"
_MANUAL = "sglang/srt/server_args.py"


def launch_arguments(names: set[str], text: Callable[[str], str]) -> dict[str, ArgumentKind]:
    """Return the arguments by name, with underscores, as SGLang's ``add_cli_args_from_dataclass`` derives them.

    Args:
        names: paths of the wheel's files.
        text: returns the text of such a file.
    """
    choices = _constants(ast.parse(text(_CHOICES)), {})
    found: dict[str, ArgumentKind] = {}
    for path in sorted(name for name in names if name.startswith(_FIELDS) and name.endswith(".py")):
        tree = ast.parse(text(path))
        constants = _constants(tree, choices)
        for node in ast.walk(tree):
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                found |= _field(node.target.id, node.annotation, constants)
    for call in (node for node in ast.walk(ast.parse(text(_MANUAL))) if isinstance(node, ast.Call)):
        if isinstance(call.func, ast.Attribute) and call.func.attr == "add_argument":
            option = ast.literal_eval(call.args[0])
            described = {keyword.arg: keyword.value for keyword in call.keywords if keyword.arg}
            is_flag = "action" in described and "choices" not in described
            found[_name(option)] = "flag" if is_flag else _listed(described, choices) or "text"
    return dict(sorted(found.items()))


def _field(name: str, annotation: ast.expr, constants: Mapping[str, list[str]]) -> dict[str, ArgumentKind]:
    """Return the arguments of a field ``name: A[type, help or Arg(...)]``."""
    if not (isinstance(annotation, ast.Subscript) and ast.unparse(annotation.value) == "A"):
        return {}
    assert isinstance(annotation.slice, ast.Tuple)
    type_, *metadata = annotation.slice.elts
    described: dict[str, ast.expr] = {}
    for call in metadata:
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "Arg":
            described = {keyword.arg: keyword.value for keyword in call.keywords if keyword.arg}
    if "no_cli" in described and ast.literal_eval(described["no_cli"]):
        return {}
    options = [ast.literal_eval(described["cli_name"]) if "cli_name" in described else f"--{name}"]
    options += ast.literal_eval(described["aliases"]) if "aliases" in described else []
    kind = _kind(type_, described, constants)
    arguments = {_name(option): kind for option in options if option.startswith("--")}
    if "action" in described and "BooleanOptionalAction" in ast.unparse(described["action"]):
        arguments = {word: "flag" for known in arguments for word in (known, f"no_{known}")}
    return arguments


def _kind(type_: ast.expr, described: Mapping[str, ast.expr], constants: Mapping[str, list[str]]) -> ArgumentKind:
    type_name = ast.unparse(type_)
    if optional := re.fullmatch(r"Optional\[(.*)\]", type_name):
        type_name = optional[1]
    type_name = type_name.removesuffix(" | None")
    if "action" in described:
        return "texts"
    if (choices := _listed(described, constants)) and "nargs" not in described:
        return choices
    if literal := re.fullmatch(r"Literal(\[.*\])", type_name):
        return [str(value) for value in ast.literal_eval(literal[1])]
    if "type_parser" in described:
        return "text"
    of_list = re.fullmatch(r"[Ll]ist(?:\[(.*)\])?", type_name)
    if type_name == "bool":
        return "flag"
    element = (of_list[1] or "str") if of_list else type_name
    word = element if element in ("int", "float") else "text"
    several = of_list or ("nargs" in described and ast.literal_eval(described["nargs"]) in ("+", "*"))
    return f"{word}s" if several else word


def _listed(described: Mapping[str, ast.expr], constants: Mapping[str, list[str]]) -> list[str] | None:
    return _texts(described["choices"], constants) if "choices" in described else None


def _constants(tree: ast.Module, known: Mapping[str, list[str]]) -> dict[str, list[str]]:
    """Return the module's constants that are lists of values, in addition to the `known` ones."""
    found = dict(known)
    for node in tree.body:
        target = node.targets[0] if isinstance(node, ast.Assign) else None
        if isinstance(node, ast.Assign) and isinstance(target, ast.Name):
            values = _texts(node.value, found)
            found |= {} if values is None else {target.id: values}
    return found


def _texts(node: ast.expr, constants: Mapping[str, list[str]]) -> list[str] | None:
    """Evaluate a list of constants, its name, or a sum of lists; None for anything else."""
    if isinstance(node, ast.Name):
        return constants.get(node.id)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = _texts(node.left, constants), _texts(node.right, constants)
        return None if left is None or right is None else left + right
    try:
        value = ast.literal_eval(node)
    except ValueError:
        return None
    return [str(item) for item in value] if isinstance(value, list | tuple | set) else None


def _name(option: str) -> str:
    return option.removeprefix("--").replace("-", "_")
