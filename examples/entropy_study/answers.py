"""The form of a section of the report: a question, its answer in one sentence, and the evidence."""

from __future__ import annotations

from collections.abc import Sequence


def section(heading: str, question: str, answer: str, *evidence: Sequence[str]) -> list[str]:
    """The lines of a section; each block of ``evidence`` is a list of lines, a figure or a table."""
    lines = [f"## {heading}", "", f"*{question}*", "", f"**{answer}**"]
    for block in evidence:
        lines += ["", *block]
    return lines


def listed(names: Sequence[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``; ``none`` for no name."""
    *first, last = names or ["none"]
    return f"{', '.join(first)} and {last}" if first else last


def between(values: Sequence[float], digits: int = 1) -> str:
    """``1.7 to 6.9`` for the least and the greatest of ``values``, or one number if they agree when rounded."""
    low, high = (f"{value:.{digits}f}" for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"
