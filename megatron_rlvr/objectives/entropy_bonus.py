"""An entropy bonus with a fixed coefficient, or with one that adapts to keep entropy at a target."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class EntropyBonus:
    """A bonus coefficient * H on every token's objective.

    Without ``target`` (nats) the coefficient is fixed. With a target it adapts as in Skywork-OR1 (arXiv 2505.22312):
    a number c starts at ``coefficient`` and, before each step, grows by ``increment`` if the entropy is below the
    target and shrinks by it if the entropy is above, within [0, maximum]. The coefficient of the step is c if the
    entropy is at or below the target, and 0 otherwise.
    """

    coefficient: float = 0.0
    target: float | None = None
    increment: float = 0.005
    maximum: float = 1.0
    _adaptive: float = field(default=0.0, init=False, repr=False)
    _active: bool = field(default=True, init=False, repr=False)

    def __post_init__(self) -> None:
        if not self.coefficient >= 0.0:
            raise ValueError(f"entropy bonus: coefficient must not be negative, found {self.coefficient!r}")
        if self.target is not None and not self.target > 0.0:
            raise ValueError(f"entropy bonus: target must be above 0 nats, found {self.target!r}")
        if not (self.increment > 0.0 and self.maximum >= self.coefficient):
            raise ValueError(
                "entropy bonus: needs increment > 0 and maximum >= coefficient, "
                f"found {self.increment!r}, {self.maximum!r}"
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
