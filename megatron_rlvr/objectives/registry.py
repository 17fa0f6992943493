"""Objectives by name: from the ``name`` and parameters in a configuration to the objective of a step."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from megatron_rlvr.control.by_name import check_name, check_parameters, parameters_dataclass
from megatron_rlvr.objectives.clip import Clip, DynamicClip
from megatron_rlvr.objectives.covariance import CovarianceClip, CovarianceKL
from megatron_rlvr.objectives.entropy_bonus import EntropyBonus
from megatron_rlvr.objectives.gradient_preserving import ClippedImportanceWeight, GradientPreservingClip
from megatron_rlvr.objectives.importance import ImportanceCap, ImportanceLevel, TruncatedImportance
from megatron_rlvr.objectives.policy_objective import PolicyObjective
from megatron_rlvr.objectives.sequence_ratio import SequenceClip

# name -> (class, default parameters of the name, which a configuration may override)
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


@dataclass
class ObjectiveParameters:
    """A token objective's ``name`` and the importance weights that go with any objective.

    Each name has a subclass in ``OBJECTIVE_PARAMETERS``, which adds the objective's own parameters and those of an
    entropy bonus (``entropy_coefficient`` and so on, see :class:`EntropyBonus`).
    """

    name: str = "clip"
    importance_cap: ImportanceCap | None = None
    """Largest importance weight pi_old / pi_rollout, to correct for the mismatch between the engine that sampled and
    the weights that train; null applies no weights."""
    importance_level: ImportanceLevel | None = None
    """Whether a token's weight is its own (``token``) or the product over its sequence (``sequence``); null is token.
    Needs `importance_cap`."""


def _parameters(name: str, objective_class: type, preset: Mapping[str, Any]) -> type[ObjectiveParameters]:
    """The subclass of ObjectiveParameters for ``name``: the objective's own fields and those of EntropyBonus."""
    parameters = [
        (source, f, prefix + f.name)
        for source, prefix in ((objective_class, ""), (EntropyBonus, "entropy_"))
        for f in fields(source)
        if f.init
    ]
    return parameters_dataclass(ObjectiveParameters, name, objective_class, parameters, preset)


OBJECTIVE_PARAMETERS: dict[str, type[ObjectiveParameters]] = {
    name: _parameters(name, objective_class, preset) for name, (objective_class, preset) in OBJECTIVES.items()
}


def objective_parameters(name: str) -> list[str]:
    """The parameters that the objective ``name`` takes. Raises ValueError for an unknown name."""
    check_name("objective", name, OBJECTIVES)
    return [f.name for f in fields(OBJECTIVE_PARAMETERS[name]) if f.name != "name"]


def build_objective(chosen: str | ObjectiveParameters = "clip", **parameters: Any) -> PolicyObjective:
    """Build an objective by name with its ``parameters``, or from an ObjectiveParameters.

    A parameter that is None takes its default. Raises ValueError, in one line that names the valid choices, for an
    unknown name, an unknown parameter or an impossible value.
    """
    if isinstance(chosen, ObjectiveParameters):
        parameters = dataclasses.asdict(chosen) | parameters
        name = str(parameters.pop("name"))
    else:
        name = chosen
    check_parameters(f"objective {name}", parameters, objective_parameters(name))
    overrides = {key: value for key, value in parameters.items() if value is not None}
    bonus, importance = _take(overrides, "entropy_"), _take(overrides, "importance_")
    if importance and "cap" not in importance:
        raise ValueError(f"objective {name}: importance_level needs importance_cap, for example importance_cap=2.0")
    objective_class, preset = OBJECTIVES[name]
    try:
        return PolicyObjective(
            objective_class(**{**preset, **overrides}),
            TruncatedImportance(**importance) if importance else None,
            EntropyBonus(**bonus) if bonus.get("coefficient") or bonus.get("target") is not None else None,
        )
    except TypeError as error:
        raise ValueError(f"objective {name}: {error}") from error


def _take(parameters: dict[str, Any], prefix: str) -> dict[str, Any]:
    """Remove the parameters that start with ``prefix`` and return them without it."""
    return {key.removeprefix(prefix): parameters.pop(key) for key in list(parameters) if key.startswith(prefix)}
