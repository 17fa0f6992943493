"""The interface of all clip schedules."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from megatron_rlvr.control.steering import SteeringResponse
from megatron_rlvr.control.thresholds import ClipThresholds


@dataclass(frozen=True)
class Observation:
    """The arguments of one call of :meth:`ClipSchedule.observe`, which documents them."""

    step: int
    entropy: float
    tokens: int | None = None
    response: SteeringResponse | None = None
    standard_error: float | None = None
    rate: float = 1.0
    momentum: float = 0.0
    updates: int = 1


class ClipSchedule:
    """Base class of the schedules: observes the entropy, returns thresholds, and keeps its state in a checkpoint."""

    name: ClassVar[str]

    def observe(
        self,
        step: int,
        entropy: float,
        *,
        tokens: int | None = None,
        response: SteeringResponse | None = None,
        standard_error: float | None = None,
        rate: float = 1.0,
        momentum: float = 0.0,
        updates: int = 1,
    ) -> None:
        """Record the mean entropy measured before the updates of ``step``.

        Args:
            step: counts from 0.
            entropy: exact mean entropy of the policy over the step's response tokens, in nats per token.
            tokens: response tokens trained on before this step. Required if progress is counted in tokens.
            response: effect of steering on this step's tokens. Used by :class:`TargetEntropy` only.
            standard_error: of ``entropy``, in nats per token. Used by :class:`TargetEntropy` only.
            rate: learning rate of this step relative to its peak, 0 to 1. Used by :class:`TargetEntropy` only.
            momentum: beta_1 of Adam, 0 to below 1: how long an update acts on after it. Used by
                :class:`TargetEntropy` only.
            updates: number of updates of this step, over which momentum acts. Used by :class:`TargetEntropy` only.

        Raises:
            ValueError: if ``step`` is negative, ``entropy`` is negative or not finite, ``response`` is not finite, or
                ``momentum`` or ``updates`` is out of range.
                The state of the schedule is unchanged then.
        """
        check_step(step)
        if not (math.isfinite(entropy) and entropy >= 0.0):
            raise ValueError(f"schedule: the entropy of step {step} must be finite and not negative, found {entropy!r}")
        sums = () if response is None else (response.change, response.slope, response.ascent, response.ascent_slope)
        if not all(map(math.isfinite, sums)):
            raise ValueError(f"schedule: the steering response of step {step} must be finite, found {response}")
        if not 0.0 <= momentum < 1.0:
            raise ValueError(f"schedule: momentum is beta_1 of Adam, 0 to below 1, found {momentum!r}")
        if updates < 1:
            raise ValueError(f"schedule: a step has at least 1 update, found updates={updates!r}")
        self._observe(Observation(step, entropy, tokens, response, standard_error, rate, momentum, updates))

    def _observe(self, observation: Observation) -> None:
        """What a schedule does with an observation; its step and entropy are valid."""

    @property
    def wants_updates(self) -> bool:
        """Whether :meth:`observe_update` has any effect. If not, the trainer can skip the measurement."""
        return False

    def observe_update(self, step: int, index: int, count: int, shift: float | None) -> None:
        """Record a measurement of update ``index`` (from 0) of ``count`` in ``step``; thresholds may change afterwards.

        Optional: without it, a step keeps the steering that it began with.

        Args:
            shift: change of ln entropy that the earlier updates of the step made at the states of this update's tokens:
                ln of their mean entropy in this update's forward pass, minus ln of their mean entropy before the step.
                None for an update without active tokens. Must be the same on every rank.
        """

    def thresholds(self, step: int) -> ClipThresholds:
        """The thresholds of ``step``. Raises ValueError if ``step`` is negative."""
        raise NotImplementedError

    def advantage_weights(self, step: int) -> tuple[float, float]:
        """The weights, not negative, of positive and of negative advantages in ``step``."""
        return 1.0, 1.0

    def metrics(self) -> dict[str, float]:
        """The schedule's own step metrics, named ``control/*``, besides the thresholds."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """The state to save in a checkpoint: plain numbers, lists and strings."""
        return {"schedule": self.name}

    def check_version(self, state: dict[str, Any]) -> None:
        """Raise ValueError if ``state`` is that of an earlier version of this schedule, which cannot continue it."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state from :meth:`state_dict`. Raises ValueError if it is the state of another schedule."""
        self.check_version(state)
        if state.get("schedule") != self.name:
            raise ValueError(
                f"schedule state: this run is configured for '{self.name}', the checkpoint holds "
                f"'{state.get('schedule')}'; use the checkpoint's schedule or start a new run"
            )


def check_step(step: int) -> None:
    if step < 0:
        raise ValueError(f"schedule: step must not be negative, found {step}")
