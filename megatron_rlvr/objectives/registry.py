"""From a configuration's name and parameters to the objective of a step."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, fields
from typing import Any

from megatron_rlvr.objectives.clip import Clip, DynamicClip
from megatron_rlvr.objectives.covariance import CovarianceClip, CovarianceKL
from megatron_rlvr.objectives.entropy_bonus import EntropyBonus
from megatron_rlvr.objectives.gradient_preserving import ClippedImportanceWeight, GradientPreservingClip
from megatron_rlvr.objectives.importance import TruncatedImportance
from megatron_rlvr.objectives.sequence_ratio import SequenceClip
from megatron_rlvr.objectives.tokens import TokenInputs, TokenObjective, TokenOutputs

# name -> (class, values that the name stands for and a configuration may override)
OBJECTIVES: dict[str, tuple[type, dict[str, Any]]] = {
    "clip": (Clip, {}),
    "dual-clip": (Clip, {"dual_clip": 3.0}),
    "dcpo": (DynamicClip, {}),
    "ce-gppo": (GradientPreservingClip, {}),
    "cispo": (ClippedImportanceWeight, {}),
    "gspo": (SequenceClip, {}),
    "clip-cov": (CovarianceClip, {}),
    "kl-cov": (CovarianceKL, {}),
}
# parameters that every objective takes, beside its own
ENTROPY_PARAMETERS = {
    "entropy_coefficient": "coefficient",
    "entropy_target": "target",
    "entropy_increment": "increment",
    "entropy_maximum": "maximum",
}
IMPORTANCE_PARAMETERS = {"importance_cap": "cap", "importance_level": "level"}


@dataclass
class PolicyObjective:
    """A token objective with the factors that go with any of them: importance weights and an entropy bonus.

    The importance weight multiplies the policy term; the bonus is added as it is.
    """

    token_objective: TokenObjective
    importance: TruncatedImportance | None = None
    entropy_bonus: EntropyBonus | None = None

    def __call__(self, inputs: TokenInputs) -> TokenOutputs:
        outputs = self.token_objective(inputs)
        objective = outputs.objective
        if self.importance is not None:
            objective = objective * self.importance(inputs)
        if self.entropy_bonus is not None:
            objective = objective + self.entropy_bonus.current * inputs.entropy
        return TokenOutputs(objective, outputs.clipped_high, outputs.clipped_low)

    @property
    def needs_entropy_gradient(self) -> bool:
        """Whether ``inputs.entropy`` must carry gradient."""
        return self.entropy_bonus is not None

    @property
    def is_plain_clip(self) -> bool:
        """Whether this is ``ops.clipped_objective`` and nothing else, which the fused operator computes by itself."""
        plain = isinstance(self.token_objective, Clip) and self.token_objective.dual_clip is None
        return plain and self.importance is None and self.entropy_bonus is None

    @property
    def ignores_zero_advantage(self) -> bool:
        """Whether tokens of advantage 0 change neither the loss nor its gradient, so that a trainer may skip them."""
        covariance = isinstance(self.token_objective, CovarianceClip | CovarianceKL)  # compares a token with all others
        return self.entropy_bonus is None and not covariance

    @property
    def needs_rollout_logprob(self) -> bool:
        """Whether ``inputs.rollout_logprob`` is used."""
        return self.importance is not None

    def observe(self, step: int, entropy: float) -> None:
        """Begin ``step``, given the entropy before its updates, nats a token; called once, before any of them."""
        if isinstance(self.token_objective, CovarianceClip):
            self.token_objective.start_step(step)
        if self.entropy_bonus is not None:
            self.entropy_bonus.observe(entropy)

    def metrics(self) -> dict[str, float]:
        """``objective/entropy_coefficient``, where there is a bonus."""
        return {} if self.entropy_bonus is None else {"objective/entropy_coefficient": self.entropy_bonus.current}

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold."""
        return {} if self.entropy_bonus is None else {"entropy_bonus": self.entropy_bonus.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`. Raises ValueError when the checkpoint's run had no entropy bonus."""
        if self.entropy_bonus is None:
            return
        if "entropy_bonus" not in state:
            raise ValueError(
                "objective state: this run has an entropy bonus, the checkpoint holds none; start a new run"
            )
        self.entropy_bonus.load_state_dict(state["entropy_bonus"])


def objective_parameters(name: str) -> list[str]:
    """The parameters that the objective ``name`` takes. Raises ValueError for an unknown name."""
    if name not in OBJECTIVES:
        near = _suggest(name, list(OBJECTIVES))
        raise ValueError(f"objective: unknown name {name!r}{near}; valid: {', '.join(OBJECTIVES)}")
    own = [f.name for f in fields(OBJECTIVES[name][0]) if f.init]
    return [*own, *ENTROPY_PARAMETERS, *IMPORTANCE_PARAMETERS]


def build_objective(name: str = "clip", **parameters: Any) -> PolicyObjective:
    """The objective ``name`` with its ``parameters``.

    Beside its own, each takes ``entropy_coefficient`` (a bonus; with ``entropy_target`` it adapts, see
    :class:`EntropyBonus`) and ``importance_cap`` with ``importance_level`` (see :class:`TruncatedImportance`).
    Raises ValueError, in one line that names the valid choices, for an unknown name, an unknown parameter or an
    impossible value.
    """
    valid = objective_parameters(name)
    for key in parameters:
        if key not in valid:
            raise ValueError(
                f"objective {name}: unknown parameter {key!r}{_suggest(key, valid)}; valid: {', '.join(valid)}"
            )
    given = {key: value for key, value in parameters.items() if value is not None}
    bonus = {own: given.pop(key) for key, own in ENTROPY_PARAMETERS.items() if key in given}
    importance = {own: given.pop(key) for key, own in IMPORTANCE_PARAMETERS.items() if key in given}
    if importance and "cap" not in importance:
        raise ValueError(f"objective {name}: importance_level needs importance_cap, for example importance_cap=2.0")
    objective_class, preset = OBJECTIVES[name]
    try:
        return PolicyObjective(
            objective_class(**{**preset, **given}),
            TruncatedImportance(**importance) if importance else None,
            EntropyBonus(**bonus) if bonus.get("coefficient") or bonus.get("target") is not None else None,
        )
    except TypeError as error:
        raise ValueError(f"objective {name}: {error}") from error


def _suggest(word: str, choices: list[str]) -> str:
    near = difflib.get_close_matches(word, choices, n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""
