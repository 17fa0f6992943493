"""The table that authority.py writes: what thresholds alone did to the entropy of one rollout."""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Iterable, Mapping
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
OTHERS = tuple(bound for bound in BOUNDS if bound != "static")
REWARDS = ("task", "coin")
RATES = (3e-5, 1e-4, 3e-4)
PASSES = (1, 2, 4, 8)

Setting = tuple[str, float, int]
"""Rewards, learning rate and passes."""


@dataclass(frozen=True)
class Measurement:
    """What training on one rollout under constant thresholds did.

    Attributes:
        seed, step: the run and the step of the state that training started from.
        rewards: ``task``, or ``coin`` for random rewards.
        rate: learning rate.
        bound: name of the thresholds, a key of `BOUNDS`.
        passes: passes over the rollout.
        entropy: entropy before, nats per token.
        shift: ln of entropy after / entropy before, on the same tokens.
        clipped_high, clipped_low: fraction of the active tokens on which a bound acted, over all passes.
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


@dataclass(frozen=True)
class Comparison:
    """The measurements of one rollout from one state: one under each of `BOUNDS`, all else being equal."""

    of_bound: Mapping[str, Measurement]

    @property
    def static(self) -> Measurement:
        """Under static clipping."""
        return self.of_bound["static"]

    @property
    def setting(self) -> Setting:
        """Rewards, learning rate and passes."""
        return self.static.rewards, self.static.rate, self.static.passes

    def added(self, bound: str) -> float:
        """What a threshold adds to the change of ln entropy under static clipping, in percent."""
        return 100 * (self.of_bound[bound].shift - self.static.shift)


def compared(measurements: Iterable[Measurement]) -> list[Comparison]:
    """Group measurements by rollout and setting; those that were not made under every one of `BOUNDS` are left out."""
    cases: dict[tuple[int, int, Setting], dict[str, Measurement]] = defaultdict(dict)
    for m in measurements:
        cases[m.seed, m.step, (m.rewards, m.rate, m.passes)][m.bound] = m
    return [Comparison(of_bound) for of_bound in cases.values() if of_bound.keys() == BOUNDS.keys()]


def by_setting(measurements: Iterable[Measurement]) -> dict[Setting, list[Comparison]]:
    """The comparisons of each setting, over all states; see `compared`."""
    settings: dict[Setting, list[Comparison]] = defaultdict(list)
    for comparison in compared(measurements):
        settings[comparison.setting].append(comparison)
    return dict(settings)


def read(path: Path) -> list[Measurement]:
    """The measurements of a table; none if the file does not exist."""
    if not path.is_file():
        return []
    kinds = {"seed": int, "step": int, "passes": int, "rewards": str, "bound": str}
    with path.open(newline="") as file:
        return [Measurement(**{k: kinds.get(k, float)(v) for k, v in row.items()}) for row in csv.DictReader(file)]
