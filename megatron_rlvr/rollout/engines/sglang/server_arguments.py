"""Checks ``rollout.sglang.server``: the arguments of ``sglang.launch_server``, before a server is started with them.

``server_arguments.json`` lists the arguments of the SGLang version that this project uses, with what follows each of
them. ``tools/record_contracts.py`` reads it from SGLang's sources.
"""

from __future__ import annotations

import difflib
import functools
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from megatron_rlvr.checked_input import shown
from megatron_rlvr.errors import UserError

RECORDED = Path(__file__).with_name("server_arguments.json")
"""The arguments by name. What follows an argument is nothing (``flag``), an ``int``, a ``float``, a ``text``, several
of these (``ints`` and so on), or one of a list of texts."""

_ABBREVIATIONS = ("tp", "dp", "pp")
"""Beginnings of names that SGLang's command line takes, and that `ServerLayout` reads."""

_SET_BY_THE_TRAINER = (
    "model_path",
    "model",
    "port",
    "weight_version",
    "skip_tokenizer_init",
    "api_key",
    "admin_api_key",
)
_HTTPS = "would have the server answer https only, and the trainer uses http"
_REFUSED = {
    "config": "would hide arguments in a file, which this configuration could not check: write them here",
    "ssl_certfile": _HTTPS,
    "ssl_keyfile": _HTTPS,
    "tokenizer_worker_num": "SGLang checks no key with more than one tokenizer process, and servers get token ids",
    "trust_remote_code": "would run Python code of the model folder, which no supported model needs",
}
_UNUSED_VALUES = {"tokenizer_worker_num": 1}
_WORDS = {"int": "a whole number", "float": "a number", "text": "text"}


@functools.cache
def recorded() -> tuple[str, dict[str, str | list[str]]]:
    """Return the version of SGLang, and what follows each of its arguments."""
    record = json.loads(RECORDED.read_text())
    return record["version"], record["arguments"]


def check_arguments(arguments: Mapping[str, Any]) -> None:
    """Refuse arguments that SGLang does not have or would not accept, and those that a configuration must not set.

    Args:
        arguments: arguments by name, with underscores or hyphens. None and False leave an argument out.

    Raises:
        UserError: for the first of them.
    """
    for given, value in arguments.items():
        name, key = given.replace("-", "_"), f"rollout.sglang.server.{given}"
        if name in _SET_BY_THE_TRAINER:
            raise UserError(f"{key} is set by the trainer itself: leave it out")
        version, known = recorded()
        if name not in known and name not in _ABBREVIATIONS:
            raise UserError(f"{key}: SGLang {version} has no argument of this name{_suggestion(name, known)}")
        if value is None or value is False:
            continue
        if name in _REFUSED and value != _UNUSED_VALUES.get(name):
            raise UserError(f"{key}={shown(value)}: {_REFUSED[name]}; leave it out")
        if (expected := _expected(known.get(name, "int"), value)) is not None:
            raise UserError(f"{key}={shown(value)}: it must be {expected}")


def _suggestion(name: str, known: Collection[str]) -> str:
    continued = sorted(word for word in known if word.startswith(name)) if name else []
    close = continued[:1] if len(continued) == 1 else difflib.get_close_matches(name, known, n=1)
    if close:
        return f": did you mean {close[0]}?"
    return ": see `python -m sglang.launch_server --help`"


def _expected(kind: str | list[str], value: Any) -> str | None:
    """Return what a value must be instead; None if SGLang's command line takes it."""
    if kind == "flag":
        return None if value is True else "true or false"
    if isinstance(kind, list):
        if str(value) in kind:
            return None
        close = difflib.get_close_matches(str(value), kind, n=1)
        return f"one of {', '.join(kind)}" + (f": did you mean {close[0]}?" if close else "")
    element = kind.removesuffix("s")
    if isinstance(value, list) and kind != element:
        return None if all(_is(element, item) for item in value) else f"a list, each {_WORDS[element]}"
    return None if _is(element, value) else _WORDS[element]


def _is(kind: str, value: Any) -> bool:
    if isinstance(value, bool | list) or (isinstance(value, Mapping) and kind != "text"):
        return False
    try:
        {"int": int, "float": float, "text": str}[kind](str(value))
    except ValueError:
        return False
    return True
