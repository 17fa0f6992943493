"""Entropy control by the sign of the advantage: Entrocraft and EntroPIC, which weigh positive against negative samples.

Samples with a positive advantage mostly lower the entropy, and negative ones raise it. Thresholds stay static. They are
here for comparison with :class:`~megatron_rlvr.control.target.TargetEntropy`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

from megatron_rlvr.control.base import Observation
from megatron_rlvr.control.bounds import Within
from megatron_rlvr.control.curves import EntropyCurve
from megatron_rlvr.control.schedules import RelativeSchedule
from megatron_rlvr.control.thresholds import ClipThresholds


@dataclass
class SignSchedule(RelativeSchedule):
    """Base class of the schedules that follow ``curve`` by weights of positive and negative advantages."""

    curve: EntropyCurve = field(default_factory=EntropyCurve)
    """The target entropy over the progress of the run."""
    _target: float = field(default=0.0, init=False, repr=False)
    _weights: tuple[float, float] = field(default=(1.0, 1.0), init=False, repr=False)

    def _observe(self, observation: Observation) -> None:
        super()._observe(observation)
        assert self.initial_entropy is not None
        self._target = self.curve.value(self.progress(observation.step), self.initial_entropy)
        self._weights = self._decide(observation.entropy, self._target)

    def _decide(self, entropy: float, target: float) -> tuple[float, float]:
        """The weights of positive and negative advantages for an ``entropy`` that should be ``target``."""
        raise NotImplementedError

    def advantage_weights(self, step: int) -> tuple[float, float]:
        return self._weights

    def thresholds(self, step: int) -> ClipThresholds:
        return ClipThresholds(self.static, self.static)

    def metrics(self) -> dict[str, float]:
        positive, negative = self._weights
        return {
            "control/target": self._target,
            "control/positive_weight": positive,
            "control/negative_weight": negative,
        }


@dataclass
class Entrocraft(SignSchedule):
    """Entrocraft: samples of one sign are rejected while the entropy is outside of a band around the curve.

    Above the band only positive advantages are trained on, below it only negative ones (arXiv 2604.26326, algorithm 1).
    Rejected samples have weight 0; the loss is still divided by the tokens of all samples, where the paper divides by
    those of the accepted ones, a factor that Adam removes.
    """

    name: ClassVar[str] = "entrocraft"
    band: Annotated[float, Within(0.0)] = 0.1
    """Width of the band, in nats per token, as in the paper; the curve is its middle."""

    def _decide(self, entropy: float, target: float) -> tuple[float, float]:
        if entropy > target + 0.5 * self.band:
            return 1.0, 0.0
        if entropy < target - 0.5 * self.band:
            return 0.0, 1.0
        return 1.0, 1.0


@dataclass
class EntroPIC(SignSchedule):
    """EntroPIC: a proportional-integral controller weighs positive advantages by 1 + alpha, negative ones by 1 - alpha.

    With e = H - H_target, alpha = ``proportional`` e + ``integral`` times the sum of e over the earlier steps
    (arXiv 2511.15248; form and gains as in the implementation that the authors of Entrocraft compare with,
    github.com/lblaoke/entrocraft). Alpha is limited to [-1, 1], so that no weight is negative.
    """

    name: ClassVar[str] = "entropic"
    proportional: Annotated[float, Within(0.0, includes_low=True)] = 1.0
    """Gain of the current error, per nat."""
    integral: Annotated[float, Within(0.0, includes_low=True)] = 0.01
    """Gain of the sum of earlier errors, per nat."""
    _sum: float = field(default=0.0, init=False, repr=False)

    def _decide(self, entropy: float, target: float) -> tuple[float, float]:
        error = entropy - target
        alpha = min(max(self.proportional * error + self.integral * self._sum, -1.0), 1.0)
        self._sum += error
        return 1.0 + alpha, 1.0 - alpha

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "sum": self._sum}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._sum = state["sum"]
