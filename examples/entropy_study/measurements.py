"""What thresholds alone did to single steps, as numbers: the table that authority.py writes."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

from megatron_rlvr.control import AffineThreshold, ClipThresholds

STATIC = AffineThreshold(0.2)
BOUNDS = {
    "static": ClipThresholds(STATIC, STATIC),
    "upper": ClipThresholds(STATIC, AffineThreshold(0.5, -0.25)),
    "steep": ClipThresholds(STATIC, AffineThreshold(3.0, -2.8)),
    "lower": ClipThresholds(AffineThreshold(0.3, -0.13), STATIC),
}
REWARDS = ("task", "coin")
RATES = (3e-5, 1e-4, 3e-4)
PASSES = (1, 2, 4, 8)


@dataclass(frozen=True)
class Measurement:
    """What ``passes`` over one rollout did under constant thresholds.

    Attributes:
        seed, step: of the run whose state it began with.
        rewards: ``task`` or ``coin``.
        rate: learning rate.
        bound: of `BOUNDS`.
        passes: over the rollout, each of the run's minibatches.
        entropy: before, nats a token.
        shift: ln of the entropy after over that before, of the same tokens.
        clipped_high, clipped_low: share of the active tokens that a bound acted on, over all passes.
    """

    seed: int
    step: int
    rewards: str
    rate: float
    bound: str
    passes: int
    entropy: float
    shift: float
    clipped_high: float
    clipped_low: float


def read(path: Path) -> list[Measurement]:
    """The measurements of a table; none where there is no file."""
    if not path.is_file():
        return []
    kinds = {"seed": int, "step": int, "passes": int, "rewards": str, "bound": str}
    with path.open(newline="") as file:
        return [Measurement(**{k: kinds.get(k, float)(v) for k, v in row.items()}) for row in csv.DictReader(file)]
