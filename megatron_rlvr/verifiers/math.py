"""Mathematical answers, compared by value with math-verify."""

import logging
import re
from dataclasses import dataclass
from typing import Any

from megatron_rlvr.errors import UserError

_ANSWER_LINE = re.compile(r"answer\s*:\s*([^\n]*)", re.IGNORECASE)
_BOXED = "\\boxed{"


@dataclass(frozen=True)
class MathAnswer:
    r"""1.0 if the completion's final answer equals the reference as mathematics, else 0.0.

    The final answer is the last \boxed{...} or the last line "Answer: ..." (DAPO's form), whichever comes later.
    anywhere: without either, let math-verify look for the last expression in the text; off by default, because a
    guess that is scored teaches the model to guess.

    The reference is text (LaTeX or plain) or a number; raises UserError for anything else. One that math-verify cannot
    read as mathematics matches only letter by letter. math-verify has no
    bound on time or memory here: run it in a VerifierPool with workers.
    """

    anywhere: bool = False

    def __call__(self, completion: str, answer: Any) -> float:
        self.check_answer(answer)
        reference = str(answer)
        # A reference may be a bare value, or a whole solution that ends in \boxed{...}.
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
        """Import math-verify and sympy, which takes a busy machine seconds."""
        _equal("1", "2", boxed=True)

    def check_answer(self, answer: Any) -> None:
        """Raise UserError if an answer is neither text nor a number."""
        if isinstance(answer, bool) or not isinstance(answer, str | int | float):
            raise UserError(f"verifier math: the answer must be text or a number, found {type(answer).__name__}")


def final_answer(completion: str) -> str | None:
    r"""The text of the last \boxed{...} or "Answer: ..." line, or None if there is neither."""
    boxed_at = completion.rfind(_BOXED)
    line = None
    for line in _ANSWER_LINE.finditer(completion):  # noqa: B007 : the last match is wanted
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
    # Imported at the first use: it brings sympy, which only workers of this verifier should pay for.
    from math_verify import parse, verify

    # It warns that its time limit is off in every process that uses it; the pool has a limit of its own.
    logging.getLogger("math_verify").setLevel(logging.ERROR)

    gold = parse(f"\\boxed{{{reference.strip('$')}}}", parsing_timeout=None)
    text = f"\\boxed{{{candidate.strip('$')}}}" if boxed else candidate
    # The pool limits the time. math-verify's own limit is a signal handler, which a worker's stuck C code never runs.
    return bool(verify(gold, parse(text, parsing_timeout=None), timeout_seconds=None))
