"""The outcome of verifying one completion."""

import math
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple

from megatron_rlvr.errors import UserError

# ok: a reward was returned. error: the verifier raised, or returned something other than a finite float32.
# timeout, memory: the verifier exceeded its limit. crash: its process died, or sent something that is no reply.
STATUSES = ("ok", "error", "timeout", "memory", "crash")
REPLIED_STATUSES = ("ok", "error", "memory")
"""The statuses that a worker itself reports."""
LONGEST_ANSWER = 1000
"""Characters of a completion's answer that are kept: answers are compared with each other, not shown."""
_LARGEST_FLOAT32 = 3.4028234663852886e38


class Verdict(NamedTuple):
    """The reward of one completion, its status (one of `STATUSES`), and a text.

    The text describes the failure. If there is none, it is the answer that the verifier found in the completion, or
    empty if the verifier does not return it.
    """

    reward: float
    status: str
    detail: str = ""


def is_float32(reward: float) -> bool:
    """Whether a reward is finite as the float32 that training computes with."""
    return abs(reward) <= _LARGEST_FLOAT32  # False for NaN


def judge(verifier: Callable[[str, Any], Any], completion: str, answer: Any) -> tuple[Verdict, str]:
    """Call a verifier and convert its result or its exception to a Verdict and a traceback.

    The result is a number, or a dictionary whose ``score`` is one, with the answer of the completion as ``answer`` if
    the verifier extracts it. A user's function may raise anything, SystemExit included, and one completion must not end
    the run. Only UserError propagates, and KeyboardInterrupt.
    """
    try:
        returned = verifier(completion, answer)
        score = returned["score"] if isinstance(returned, dict) and "score" in returned else returned
        if score is None or isinstance(score, dict):
            return Verdict(0.0, "error", f"the verifier returned {_found(score)}, which is not a number"), ""
        reward = float(score)
        answer = returned.get("answer") if isinstance(returned, dict) else None
        detail = "" if answer is None else str(answer)[:LONGEST_ANSWER]
    except (UserError, KeyboardInterrupt):
        raise
    except MemoryError:
        return Verdict(0.0, "memory", "the verifier asked for more memory than its limit"), ""
    except BaseException as error:
        return Verdict(0.0, "error", describe(error)), _traceback()
    if not is_float32(reward):
        finite = math.isfinite(reward)
        return Verdict(0.0, "error", f"the verifier returned {reward}{', infinite as a float32' * finite}"), ""
    return Verdict(reward, "ok", detail), ""


def describe(error: BaseException) -> str:
    """Return the type and the text of an exception as one line."""
    try:
        return " ".join(f"{type(error).__name__}: {error}".split())
    except BaseException:  # the user's own exception may fail to give its text
        return type(error).__name__


def _traceback() -> str:
    try:
        return traceback.format_exc()
    except BaseException:  # as in `describe`
        return ""


def _found(value: Any) -> str:
    return "None" if value is None else f"a dictionary with {', '.join(map(repr, list(value)[:5])) or 'no keys'}"
