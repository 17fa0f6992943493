"""A reward function for tests."""

from typing import Any


def letter_sum(completion: str, answer: Any) -> float:
    """1 for about half of all texts, whatever they say, so that a random model's groups contain both rewards."""
    return float(sum(completion.encode()) % 2)


def divides_by_zero(completion: str, answer: Any) -> float:
    """A verifier with a bug."""
    return 1 / 0
