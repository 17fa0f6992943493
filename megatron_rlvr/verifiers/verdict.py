"""The outcome of verifying one completion."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from megatron_rlvr.errors import UserError

# ok: a reward was returned. error: the verifier raised, or returned something other than a finite number.
# timeout, memory: the verifier exceeded its limit. crash: its process died.
STATUSES = ("ok", "error", "timeout", "memory", "crash")


class Verdict(NamedTuple):
    """The reward of one completion, its status (one of `STATUSES`), and a description of the failure, if any."""

    reward: float
    status: str
    detail: str = ""


def judge(verifier: Callable[[str, Any], float], completion: str, answer: Any) -> Verdict:
    """Call a verifier and convert its result or its exception to a Verdict. Only UserError propagates."""
    try:
        reward = float(verifier(completion, answer))
    except UserError:
        raise
    except MemoryError:
        return Verdict(0.0, "memory", "the verifier asked for more memory than its limit")
    except Exception as error:  # a user's function may raise anything, and one completion must not end the run
        return Verdict(0.0, "error", f"{type(error).__name__}: {error}")
    if not math.isfinite(reward):
        return Verdict(0.0, "error", f"the verifier returned {reward}")
    return Verdict(reward, "ok")
