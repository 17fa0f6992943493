"""Verifiers by name."""

import inspect
from collections.abc import Callable, Iterable
from typing import Any

from megatron_rlvr.errors import UserError
from megatron_rlvr.verifiers.config import VerifierConfig
from megatron_rlvr.verifiers.countdown import Countdown
from megatron_rlvr.verifiers.exact import ExactMatch
from megatron_rlvr.verifiers.math import MathAnswer
from megatron_rlvr.verifiers.pool import VerifierPool
from megatron_rlvr.verifiers.user import load_user_verifier

Verifier = Callable[[str, Any], float]

DEFAULT_WORKERS = 4
# Exact and quick whatever the completion says: workers would cost more than they protect from.
BOUNDED = (Countdown, ExactMatch)

VERIFIERS: dict[str, Callable[..., Verifier]] = {"countdown": Countdown, "exact": ExactMatch, "math": MathAnswer}


def check_answers(verifier: Verifier, answers: Iterable[Any], source: str = "the data set") -> None:
    """Raise UserError, naming the first such answer's position in ``source``, if a verifier cannot read one of them.

    For the start of a run: the same answer would otherwise end it hours later. Verifiers without a
    ``check_answer(answer)`` method, such as user functions, pass.
    """
    check = getattr(verifier, "check_answer", None)
    if check is None:
        return
    for index, answer in enumerate(answers):
        try:
            check(answer)
        except UserError as error:
            raise UserError(f"example {index} (counted from 0) of {source}: {error}") from error


def build_verifier(name: str, **options: Any) -> Verifier:
    """The verifier called ``name``: one of ``VERIFIERS``, or "module:function" for a user's own.

    Options go to the verifier (to the user's function as keyword arguments). Raises UserError for an unknown name, an
    option the verifier does not have, and a user function that cannot be imported.
    """
    if ":" in name:
        return load_user_verifier(name, options)
    if name not in VERIFIERS:
        raise UserError(f"verifier {name!r} is not known; write one of {', '.join(VERIFIERS)} or module:function")
    factory = VERIFIERS[name]
    known = list(inspect.signature(factory).parameters)
    for option in options:
        if option not in known:
            raise UserError(f"verifier {name} has no option {option!r}; it has {', '.join(known) or 'none'}")
    return factory(**options)


def build_pool(config: VerifierConfig, judges: bool = True) -> VerifierPool:
    """The pool of a run's verifier; a process that never `judges` starts no workers.

    Raises UserError for what `build_verifier` and `VerifierPool` refuse.
    """
    verifier = build_verifier(config.name, **config.options)
    workers = config.workers
    if workers is None:
        workers = 0 if isinstance(verifier, BOUNDED) else DEFAULT_WORKERS
    return VerifierPool(verifier, workers if judges else 0, config.timeout_seconds, config.memory_mb)
