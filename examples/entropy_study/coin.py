"""A verifier with random rewards (``verifier.name: coin:toss``), for runs without a learning signal."""

from __future__ import annotations

import hashlib
from typing import Any


def toss(completion: str, answer: Any) -> float:
    """0 or 1 with equal probability; the same for the same completion of the same problem, so runs are reproducible."""
    return float(hashlib.sha256(f"{answer} {completion}".encode()).digest()[0] & 1)
