"""Tasks by name, as in the package."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from typing import Any


@dataclass
class SumConfig:
    largest: int = 99
    tolerance: int = 0
    seed: int | None = None
    size: int = 500


class Sum:
    """Problem i of seed s is drawn from s + i, as the tasks of the package do."""

    def __init__(self, config: Any) -> None:
        assert config.largest > 0, "largest must be positive"
        self.config = config

    def numbers(self, index: int) -> tuple[int, ...]:
        rng = random.Random(self.config.seed + index)
        return rng.randint(1, self.config.largest), rng.randint(1, self.config.largest)

    def __getitem__(self, index: int) -> dict[str, Any]:
        a, b = self.numbers(index)
        return {"question": f"{a} + {b} =", "answer": str(a + b), "metadata": {"numbers": (a, b), "size": a}}

    def score_answer(self, answer: str | None, entry: dict[str, Any]) -> float:
        if answer is None:
            return 0.0
        assert isinstance(entry["metadata"]["numbers"], tuple)  # some tasks of the package compare tuples
        return 1.0 if abs(int(answer) - int(entry["answer"])) <= self.config.tolerance else 0.01


class Words(Sum):
    """Iterates over a set of texts, so that its problems depend on their hashes."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        words = list({f"word{number}" for number in range(50)})
        return {"question": f"{index} {' '.join(words)}", "answer": None, "metadata": {}}


class Slow(Sum):
    def __getitem__(self, index: int) -> dict[str, Any]:
        time.sleep(3600)
        raise AssertionError


DATASETS = {"sum": (Sum, SumConfig), "words": (Words, SumConfig), "slow": (Slow, SumConfig)}


def create_dataset(name: str, **settings: Any) -> Any:
    task, config = DATASETS[name]
    return task(config(**settings))
