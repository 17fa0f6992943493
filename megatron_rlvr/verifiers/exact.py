"""Exact match with the answer."""

from dataclasses import dataclass
from typing import Any

from megatron_rlvr.errors import UserError


@dataclass(frozen=True)
class ExactMatch:
    """1.0 if the completion equals the answer, with runs of white space collapsed to one space; else 0.0.

    Attributes:
        after: compare only the text after the last occurrence of this marker; the reward is 0.0 if there is none.
        ignore_case: ignore case.

    Raises:
        UserError: on call, if the answer is neither a string nor a number.
    """

    after: str = ""
    ignore_case: bool = False

    def __call__(self, completion: str, answer: Any) -> float:
        self.check_answer(answer)
        if self.after:
            _, marker, completion = completion.rpartition(self.after)
            if not marker:
                return 0.0
        return float(self._normalized(completion) == self._normalized(str(answer)))

    def check_answer(self, answer: Any) -> None:
        """Raise UserError if the answer is neither a string nor a number."""
        if not isinstance(answer, str | int | float):
            raise UserError(f"verifier exact: the answer must be text or a number, found {type(answer).__name__}")

    def _normalized(self, text: str) -> str:
        text = " ".join(text.split())
        return text.casefold() if self.ignore_case else text
