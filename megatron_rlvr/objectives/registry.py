"""Objectives by name: from the ``name`` and parameters in a configuration to the objective of a step."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal

from megatron_rlvr.control.bounds import Within
from megatron_rlvr.control.by_name import check_name, check_parameters, parameters_dataclass
from megatron_rlvr.objectives.clip import Clip, DynamicClip
from megatron_rlvr.objectives.covariance import CovarianceClip, CovarianceKL
from megatron_rlvr.objectives.divergence_mask import DivergenceMask
from megatron_rlvr.objectives.entropy_bonus import EntropyBonus
from megatron_rlvr.objectives.entropy_ratio import EntropyRatioClip
from megatron_rlvr.objectives.gradient_preserving import ClippedImportanceWeight, GradientPreservingClip
from megatron_rlvr.objectives.importance import Correction, ImportanceWeights
from megatron_rlvr.objectives.importance_presets import parse_importance
from megatron_rlvr.objectives.policy_objective import PolicyObjective
from megatron_rlvr.objectives.sequence_ratio import SequenceClip
from megatron_rlvr.objectives.soft_gate import SoftGate

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
    "sapo": (SoftGate, {}),
    "dppo": (DivergenceMask, {}),
    "erc": (EntropyRatioClip, {}),
}


@dataclass
class ObjectiveParameters:
    """A token objective's ``name`` and the importance weights that go with any objective.

    Each name has a subclass in ``OBJECTIVE_PARAMETERS``, which adds the objective's own parameters and those of an
    entropy bonus (``entropy_coefficient`` and so on, see :class:`EntropyBonus`).
    """

    name: str = "clip"
    importance_cap: Annotated[float, Within(1.0, includes_low=True)] | None = None
    """Short for `importance`: ``tis(cap=...)``, which is the largest importance weight pi_old / pi_rollout."""
    importance_level: Literal["token", "sequence"] | None = None
    """With `importance_cap`: whether a token's weight is its own (``token``) or the product over its sequence
    (``sequence``); null is token."""
    importance: str | None = None
    """Corrections of the difference between the sampling policy and the one that trains: ``tis``, ``sequence-tis``,
    ``icepop``, ``decoupled``, ``mis``, ``geometric``, ``k3``, ``opsm`` or ``m2po``. Parentheses hold other values, as
    in ``icepop(floor=0.4, cap=4)``. Several joined by ``+`` multiply. Null corrects nothing."""


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
    corrections = overrides.pop("importance", None)
    bonus, shorthand = _take(overrides, "entropy_"), _take(overrides, "importance_")
    objective_class, preset = OBJECTIVES[name]
    try:
        return PolicyObjective(
            objective_class(**{**preset, **overrides}),
            _importance_weights(name, corrections, shorthand),
            EntropyBonus(**bonus) if bonus.get("coefficient") or bonus.get("target") is not None else None,
        )
    except TypeError as error:
        raise ValueError(f"objective {name}: {error}") from error


def _importance_weights(name: str, corrections: str | None, shorthand: dict[str, Any]) -> ImportanceWeights | None:
    """The corrections that ``importance`` writes out, or those of ``importance_cap`` and ``importance_level``."""
    if corrections is not None and shorthand:
        raise ValueError(
            f"objective {name}: importance_{next(iter(shorthand))} is short for importance=tis(...), but importance is "
            f"{corrections}: set only one of them"
        )
    if corrections is not None:
        return parse_importance(corrections)
    if shorthand and "cap" not in shorthand:
        raise ValueError(f"objective {name}: importance_level needs importance_cap, for example importance_cap=2.0")
    return ImportanceWeights((Correction(**shorthand),)) if shorthand else None


def _take(parameters: dict[str, Any], prefix: str) -> dict[str, Any]:
    """Remove the parameters that start with ``prefix`` and return them without it."""
    return {key.removeprefix(prefix): parameters.pop(key) for key in list(parameters) if key.startswith(prefix)}
