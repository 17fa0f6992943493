"""Exact match of the answer's text."""

from dataclasses import dataclass
from typing import Any

from megatron_rlvr.errors import UserError


@dataclass(frozen=True)
class ExactMatch:
    """1.0 if the completion is the answer, letter by letter, after runs of white space are made one blank.

    after: if given, only what follows the last occurrence of this text is compared (no occurrence: 0.0).
    ignore_case: compare without regard to case.
    The answer is a string or a number; raises UserError for anything else.
    """

    after: str = ""
    ignore_case: bool = False

    def __call__(self, completion: str, answer: Any) -> float:
        self.check_answer(answer)
        if self.after:
            _, marker, completion = completion.rpartition(self.after)
            if not marker:
                return 0.0
        return float(self._normal(completion) == self._normal(str(answer)))

    def check_answer(self, answer: Any) -> None:
        """Raise UserError if an answer is neither text nor a number."""
        if not isinstance(answer, str | int | float):
            raise UserError(f"verifier exact: the answer must be text or a number, found {type(answer).__name__}")

    def _normal(self, text: str) -> str:
        text = " ".join(text.split())
        return text.casefold() if self.ignore_case else text
