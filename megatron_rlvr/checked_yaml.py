"""YAML files of untrusted origin: bounded in size, in nesting, and in what their aliases expand to."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_rlvr.checked_input import DEPTH, InvalidInputError, one_line, read_bytes
from megatron_rlvr.errors import UserError

YAML_BYTES = 2**20
"""Maximum size of a YAML file, in bytes."""
YAML_NODES = 100_000
"""Maximum number of keys and values of a YAML file, with aliases expanded."""


def read_yaml(path: str | Path, parse: Callable[[str], Any] | None = None) -> Any:
    """Read the keys and values of a YAML file with OmegaConf, with ``${...}`` as it stands.

    Args:
        path: the file.
        parse: returns the values of a YAML document; None means OmegaConf's own reading.

    Raises:
        UserError: if the file does not exist, is too large, is not YAML, or does not hold keys and values.
    """
    from omegaconf import OmegaConf  # here, because tools that read no YAML start faster without it

    try:
        data = read_bytes(Path(path), YAML_BYTES)
        if len(data) > YAML_BYTES:
            raise InvalidInputError(f"it has more than {YAML_BYTES} bytes")
        text = data.decode("utf-8-sig")
        _check_yaml_size(text)
        tree = OmegaConf.load(io.StringIO(text)) if parse is None else parse(text)
        if parse is not None and not isinstance(tree, list | str):
            tree = OmegaConf.create({} if tree is None else tree)
    except FileNotFoundError:
        raise UserError(f"no configuration file {path}: give the path of a YAML file as the first argument") from None
    except RecursionError:
        raise UserError(f"{path} is not a configuration: it is nested deeper than {DEPTH} levels") from None
    except Exception as error:  # OmegaConf passes on whatever a constructor of a YAML value raises
        raise UserError(f"{path} is not valid YAML, so it is not a configuration: {one_line(error)}") from None
    if not OmegaConf.is_dict(tree):
        kind = "a list" if isinstance(tree, list) or OmegaConf.is_list(tree) else "a single value"
        raise UserError(f"{path} holds {kind}: write keys and values, such as steps: 100")
    return tree


def _check_yaml_size(text: str) -> None:
    """Refuse YAML whose aliases expand to more than `YAML_NODES` values, or whose values contain themselves."""
    import yaml

    sizes: dict[int, int] = {}

    def size(node: yaml.Node, depth: int) -> int:
        if depth > DEPTH:
            raise InvalidInputError(f"nested deeper than {DEPTH} levels")
        if id(node) not in sizes:
            inner = [part for item in node.value for part in (item if isinstance(item, tuple) else (item,))]
            sizes[id(node)] = 1 + sum(size(part, depth + 1) for part in inner if isinstance(part, yaml.Node))
        return sizes[id(node)]

    root = yaml.compose(text, Loader=yaml.SafeLoader)
    if root is not None and size(root, 0) > YAML_NODES:
        raise InvalidInputError(f"its aliases expand to more than {YAML_NODES} values")
