"""Answers to problems of the package reasoning-gym, scored by the package itself."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from typing import Any

from megatron_rlvr.errors import UserError

_MARK = "reasoning_gym"
"""Key under which an answer names its task; other answers are not of the package."""


@dataclass(frozen=True)
class ReasoningGym:
    """The score that a task of reasoning-gym gives to the completion's answer, from 0.0 to 1.0.

    Some tasks evaluate the answer as a Python expression: run it in a VerifierPool with workers.

    Attributes:
        answer_tag: the answer is what stands between the last <answer> and </answer>; without these tags it is missing.
            None takes the whole completion.
        others: name of the verifier of all answers that are not of reasoning-gym, those of files in a mixture.

    Raises:
        UserError: on call, if the answer cannot be read.
    """

    answer_tag: str | None = "answer"
    others: str = "math"

    def __call__(self, completion: str, answer: Any) -> float:
        if not (isinstance(answer, dict) and _MARK in answer):
            return _other(self.others)(completion, answer)
        from reasoning_gym.utils import extract_answer

        given = completion.strip() if self.answer_tag is None else extract_answer(completion, self.answer_tag)
        # A task reads its own configuration when it scores, for example tolerances.
        task = _task(answer[_MARK], json.dumps(answer.get("options", {}), sort_keys=True))
        return float(task.score_answer(given, answer))

    def check_answer(self, answer: Any) -> None:
        """Raise UserError if the answer is neither an entry of reasoning-gym nor one of the other verifier."""
        if not (isinstance(answer, dict) and _MARK in answer):
            getattr(_other(self.others), "check_answer", lambda _: None)(answer)
            return
        if missing := [key for key in ("answer", "metadata") if key not in answer]:
            raise UserError(f"verifier reasoning_gym: the answer has no {missing[0]!r}")

    def warm_up(self) -> None:
        """Import the package, which takes a second."""
        import reasoning_gym  # noqa: F401


@functools.cache
def _task(name: str, options: str) -> Any:
    from reasoning_gym.factory import create_dataset

    return create_dataset(name, seed=0, size=1, **json.loads(options))


@functools.cache
def _other(name: str) -> Any:
    from megatron_rlvr.verifiers.build import build_verifier

    return build_verifier(name)
