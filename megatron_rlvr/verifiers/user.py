"""User-defined verifiers."""

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any

from megatron_rlvr.errors import UserError


def load_user_verifier(name: str, options: dict[str, Any]) -> Callable[[str, Any], float]:
    """Import "module:function" and bind ``options`` as keyword arguments.

    The function is called as ``function(completion_text, answer, **options)`` and returns a number.

    Raises:
        UserError: if the module cannot be imported by name (worker processes import it too), or the function does not
            accept these arguments.
    """
    module_name, _, function_name = name.partition(":")
    if not module_name or not function_name.isidentifier():
        raise UserError(f"verifier {name!r} is not of the form module:function, such as my_rewards:score")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UserError(
            f"verifier {name}: cannot import {module_name} ({error}); "
            "start from the folder that contains it, or install it"
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        names = [key for key, value in vars(module).items() if inspect.isfunction(value) and not key.startswith("_")]
        raise UserError(
            f"verifier {name}: {module_name} has no function {function_name}; it has {', '.join(names) or 'none'}"
        )
    try:
        inspect.signature(function).bind("completion", "answer", **options)
    except TypeError as error:
        raise UserError(
            f"verifier {name}: cannot be called as {function_name}(completion, answer"
            f"{''.join(f', {key}=...' for key in options)}): {error}; change the function or verifier.options"
        ) from error
    return functools.partial(function, **options) if options else function
