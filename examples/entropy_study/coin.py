"""A verifier that says nothing about an answer: ``verifier.name: coin:toss``, for runs without anything to learn."""

from __future__ import annotations

import hashlib
from typing import Any


def toss(completion: str, answer: Any) -> float:
    """0 or 1 with equal chance, the same for the same completion of the same problem, so that a run is reproducible."""
    return float(hashlib.sha256(f"{answer} {completion}".encode()).digest()[0] & 1)
