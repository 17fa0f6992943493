"""An entropy bonus with a fixed coefficient, or with one that adapts to keep entropy at a target."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from megatron_rlvr.control.bounds import Within, check_bounds


@dataclass
class EntropyBonus:
    """A bonus coefficient * H on every token's objective.

    Without ``target`` (nats) the coefficient is fixed. With a target it adapts as in Skywork-OR1 (arXiv 2505.22312):
    a number c starts at ``coefficient`` and, before each step, grows by ``increment`` if the entropy is below the
    target and shrinks by it if the entropy is above, within [0, maximum]. The coefficient of the step is c if the
    entropy is at or below the target, and 0 otherwise.
    """

    coefficient: Annotated[float, Within(0.0, includes_low=True)] = 0.0
    """Coefficient of an entropy bonus; with a target, the coefficient to start from."""
    target: Annotated[float, Within(0.0)] | None = None
    """Entropy that an adaptive coefficient aims at, in nats per token; null keeps the coefficient fixed."""
    increment: Annotated[float, Within(0.0)] = 0.005
    """Change of the adaptive coefficient per step."""
    maximum: Annotated[float, Within(0.0, includes_low=True)] = 1.0
    """Largest adaptive coefficient, not less than the one to start from."""
    _adaptive: float = field(default=0.0, init=False, repr=False)
    _active: bool = field(default=True, init=False, repr=False)

    def __post_init__(self) -> None:
        check_bounds(self, "entropy bonus")
        if not self.maximum >= self.coefficient:
            raise ValueError(
                f"entropy bonus: maximum must be at least coefficient={self.coefficient!r}, found {self.maximum!r}"
            )
        self._adaptive = self.coefficient

    @property
    def current(self) -> float:
        """The coefficient of this step."""
        if self.target is None:
            return self.coefficient
        return self._adaptive if self._active else 0.0

    def observe(self, entropy: float) -> None:
        """Adapt to the entropy measured before the updates of a step, in nats per token."""
        if self.target is None:
            return
        change = self.increment if entropy < self.target else -self.increment if entropy > self.target else 0.0
        self._adaptive = min(max(self._adaptive + change, 0.0), self.maximum)
        self._active = entropy <= self.target

    def state_dict(self) -> dict[str, float | bool]:
        return {"adaptive": self._adaptive, "active": self._active}

    def load_state_dict(self, state: dict[str, float | bool]) -> None:
        self._adaptive, self._active = float(state["adaptive"]), bool(state["active"])
