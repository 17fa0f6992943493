"""From a configuration's name and parameters to a token objective."""

from __future__ import annotations

import difflib
from dataclasses import fields
from typing import Any

from megatron_rlvr.objectives.clip import Clip
from megatron_rlvr.objectives.tokens import TokenObjective

OBJECTIVES: dict[str, type] = {"clip": Clip}


def objective_parameters(name: str) -> list[str]:
    """The parameters that the objective ``name`` takes. Raises ValueError for an unknown name."""
    if name not in OBJECTIVES:
        raise ValueError(
            f"objective: unknown name {name!r}{_suggest(name, list(OBJECTIVES))}; valid: {', '.join(OBJECTIVES)}"
        )
    return [f.name for f in fields(OBJECTIVES[name]) if f.init]


def build_objective(name: str = "clip", **parameters: Any) -> TokenObjective:
    """The token objective ``name`` with its ``parameters``.

    Raises ValueError, in one line that names the valid choices, for an unknown name, an unknown parameter or an
    impossible value.
    """
    valid = objective_parameters(name)
    for key in parameters:
        if key not in valid:
            listed = ", ".join(valid) if valid else "none"
            raise ValueError(f"objective {name}: unknown parameter {key!r}{_suggest(key, valid)}; valid: {listed}")
    return OBJECTIVES[name](**parameters)


def _suggest(word: str, choices: list[str]) -> str:
    near = difflib.get_close_matches(word, choices, n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""
