"""Rewards of the tasks in tasks.py: 1.0 if a completion begins with a right answer, else 0.0.

Every reward comes with the answer that was found, so that evaluations count how many different right answers there are
(`evaluation/distinct_solutions`).
"""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

WORD = re.compile(r"[\s\"'*:“]*([A-Za-z]+)")
NUMBER = re.compile(r"\s*(\d+)(?!\d)")
SHORTEST_WORD = 3


def score(completion: str, answer: dict[str, Any], words: str = "runs/real_model/data/words.txt") -> dict[str, Any]:
    """Verify a completion.

    Args:
        completion: what the model wrote after the prompt; only its beginning counts.
        answer: one of ``{"beginning": "br"}``, any word of the list that begins so; ``{"accepted": ["chad", "south
            africa"]}``, any of these, in lower case; ``{"number": 12}``.
        words: file of the word list, one in lower case per line.

    Returns:
        score, 1.0 or 0.0, and answer, what the completion was understood to say, in lower case.
    """
    if "number" in answer:
        number = NUMBER.match(completion)
        found = number[1] if number else ""
        return {"score": float(found == str(answer["number"])), "answer": found}
    text = completion.lstrip(" \t\r\n\"'*:“").lower()
    if "accepted" in answer:
        # The longest, because "guinea-bissau" begins with "guinea".
        fitting = [name for name in answer["accepted"] if re.match(re.escape(name) + r"(?![a-z-])", text)]
        return {"score": float(bool(fitting)), "answer": max(fitting, key=len, default=text[:40])}
    match = WORD.match(completion)
    word = match[1].lower() if match else ""
    right = len(word) >= SHORTEST_WORD and word.startswith(answer["beginning"]) and word in word_list(words)
    return {"score": float(right), "answer": word}


@functools.cache
def word_list(path: str) -> frozenset[str]:
    """Read a word list."""
    return frozenset(Path(path).read_text(encoding="utf-8").split())
