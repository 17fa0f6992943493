"""Build verifiers from names and options."""

import inspect
from collections.abc import Callable, Iterable
from typing import Any

from megatron_rlvr.errors import UserError
from megatron_rlvr.verifiers.countdown import Countdown
from megatron_rlvr.verifiers.exact import ExactMatch
from megatron_rlvr.verifiers.math import MathAnswer
from megatron_rlvr.verifiers.reasoning_gym import ReasoningGym
from megatron_rlvr.verifiers.user import load_user_verifier

Verifier = Callable[[str, Any], Any]

VERIFIERS: dict[str, Callable[..., Verifier]] = {
    "countdown": Countdown,
    "exact": ExactMatch,
    "math": MathAnswer,
    "reasoning_gym": ReasoningGym,
}


def check_answers(verifier: object, answers: Iterable[Any], source: str = "the data set") -> None:
    """Check that a verifier can read every answer of a data set.

    A run does this at its start, because an unreadable answer would otherwise end it hours later. Verifiers without a
    ``check_answer(answer)`` method, such as user functions, are not checked.

    Args:
        verifier: that will read the answers, or the `VerifierSource` of a user's function.
        answers: one per example, in the order of the data set.
        source: name of the data set for the error.

    Raises:
        UserError: for the first unreadable answer; names its position.
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
    """Build a verifier.

    Args:
        name: one of ``VERIFIERS``, or "module:function" for a user's function.
        options: parameters of the verifier, or keyword arguments of the user's function.

    Raises:
        UserError: for an unknown name, an option that the verifier does not have, or a user function that cannot be
            imported.
    """
    if ":" in name:
        return load_user_verifier(name, options)
    if name not in VERIFIERS:
        raise UserError(f"verifier {name!r} is not known; write one of {', '.join(VERIFIERS)} or module:function")
    factory = VERIFIERS[name]
    known = list(inspect.signature(factory).parameters)
    for option in options:
        if option not in known:
            raise UserError(
                f"verifier {name} has no option {option!r}; it has {', '.join(known) or 'none'} (verifier.options={{}} "
                "on the command line leaves out those of the file)"
            )
    return factory(**options)
