"""Mathematical answers, compared with math-verify."""

import logging
import re
from dataclasses import dataclass
from typing import Any

from megatron_rlvr.errors import UserError

_ANSWER_LINE = re.compile(r"answer\s*:\s*([^\n]*)", re.IGNORECASE)
_BOXED = "\\boxed{"


@dataclass(frozen=True)
class MathAnswer:
    r"""1.0 if the completion's final answer is mathematically equal to the reference, else 0.0.

    The final answer is the last \boxed{...} or the last line "Answer: ..." (DAPO's form), whichever comes later. The
    reference is a string (LaTeX or plain text) or a number. A reference that math-verify cannot parse matches only
    literally. Time and memory of math-verify are unbounded: run it in a VerifierPool with workers.

    Attributes:
        anywhere: if the completion has neither form, let math-verify search it for its last expression. Off by
            default, because rewarding unmarked answers teaches the model to guess.

    Raises:
        UserError: on call, if the reference is neither a string nor a number.
    """

    anywhere: bool = False

    def __call__(self, completion: str, answer: Any) -> float:
        self.check_answer(answer)
        reference = str(answer)
        # A reference is a bare value, or a solution that ends in \boxed{...}.
        reference = _last_boxed(reference) or reference
        final = final_answer(completion)
        if final is None:
            if not self.anywhere:
                return 0.0
            return float(_equal(reference, completion, boxed=False))
        if _plain(final) == _plain(reference):
            return 1.0
        return float(_equal(reference, final, boxed=True))

    def warm_up(self) -> None:
        """Import math-verify and sympy, which can take seconds."""
        _equal("1", "2", boxed=True)

    def check_answer(self, answer: Any) -> None:
        """Raise UserError if the answer is neither a string nor a number."""
        if isinstance(answer, bool) or not isinstance(answer, str | int | float):
            raise UserError(f"verifier math: the answer must be text or a number, found {type(answer).__name__}")


def final_answer(completion: str) -> str | None:
    r"""Return the text of the last \boxed{...} or "Answer: ..." line, or None if there is neither."""
    boxed_at = completion.rfind(_BOXED)
    line = None
    for line in _ANSWER_LINE.finditer(completion):  # noqa: B007 : only the last match is used
        pass
    if boxed_at >= 0 and (line is None or boxed_at >= line.start()):
        return _last_boxed(completion)
    if line is None:
        return None
    return line[1].strip().strip("*").strip() or None


def _last_boxed(text: str) -> str | None:
    start = text.rfind(_BOXED)
    if start < 0:
        return None
    start += len(_BOXED)
    depth = 1
    for position in range(start, len(text)):
        if text[position] == "{":
            depth += 1
        elif text[position] == "}":
            depth -= 1
            if depth == 0:
                return text[start:position].strip() or None
    return None


def _plain(text: str) -> str:
    return text.strip().strip("$").replace(" ", "").rstrip(".")


def _equal(reference: str, candidate: str, *, boxed: bool) -> bool:
    # Imported on first use, because it imports sympy, which other verifiers do not need.
    from math_verify import parse, verify

    # math-verify would warn in every process that its time limit is off. The pool enforces the limit instead, because
    # math-verify uses a signal handler, which never runs while a worker is stuck in C code.
    logging.getLogger("math_verify").setLevel(logging.ERROR)

    gold = parse(f"\\boxed{{{reference.strip('$')}}}", parsing_timeout=None)
    text = f"\\boxed{{{candidate.strip('$')}}}" if boxed else candidate
    return bool(verify(gold, parse(text, parsing_timeout=None), timeout_seconds=None))
