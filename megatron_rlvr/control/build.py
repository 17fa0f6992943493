"""From a configuration's ``name`` and parameters to a schedule."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from megatron_rlvr.control.curves import EntropyCurve
from megatron_rlvr.control.schedules import (
    ClipSchedule,
    Constant,
    DecreaseIncreaseDecrease,
    IncreaseThenDecrease,
    OscillatoryDecay,
)
from megatron_rlvr.control.target import TargetEntropy

# name -> (class, values that the name stands for and a configuration may override)
SCHEDULES: dict[str, tuple[type[ClipSchedule], dict[str, Any]]] = {
    "constant": (Constant, {}),
    "clip-higher": (Constant, {"upper_intercept": 0.28}),
    "increase-then-decrease": (IncreaseThenDecrease, {}),
    "decrease-increase-decrease": (DecreaseIncreaseDecrease, {}),
    "oscillatory-decay": (OscillatoryDecay, {}),
    "target-entropy": (TargetEntropy, {}),
    "entropy-floor": (TargetEntropy, {"floor_only": True, "start": 0.6}),
}
CURVE_PARAMETERS = [f.name for f in fields(EntropyCurve)]


def schedule_parameters(name: str) -> list[str]:
    """The parameters that a configuration may give the schedule ``name``. Raises ValueError for an unknown name."""
    if name not in SCHEDULES:
        raise ValueError(
            f"schedule: unknown name {name!r}{_suggest(name, list(SCHEDULES))}; valid: {', '.join(SCHEDULES)}"
        )
    schedule_class = SCHEDULES[name][0]
    own = [f.name for f in fields(schedule_class) if f.init and f.name != "total_steps"]  # type: ignore[arg-type]
    # The curve's own parameters stand beside the schedule's, so that a configuration stays flat.
    return [*CURVE_PARAMETERS, *(x for x in own if x != "curve")] if schedule_class is TargetEntropy else own


def build_schedule(config: Mapping[str, Any], total_steps: int) -> ClipSchedule:
    """The schedule that ``config`` describes: ``{"name": ..., parameter: value, ...}``, over ``total_steps`` steps.

    Raises ValueError, in one line that names the valid choices, for an unknown name, an unknown parameter or an
    impossible value.
    """
    if "name" not in config:
        raise ValueError(f"schedule: no name given; valid: {', '.join(SCHEDULES)}")
    parameters = {str(key): value for key, value in config.items() if key != "name"}
    name = str(config["name"])
    valid = schedule_parameters(name)
    for key in parameters:
        if key not in valid:
            raise ValueError(
                f"schedule {name}: unknown parameter {key!r}{_suggest(key, valid)}; valid: {', '.join(valid)}"
            )
    schedule_class, preset = SCHEDULES[name]
    parameters = {**preset, **parameters}
    if any(f.name == "total_steps" for f in fields(schedule_class)):  # type: ignore[arg-type]
        parameters["total_steps"] = total_steps
    try:
        if schedule_class is TargetEntropy:
            curve = {key: parameters.pop(key) for key in CURVE_PARAMETERS if key in parameters}
            parameters["curve"] = EntropyCurve(**curve)
        return schedule_class(**parameters)
    except (TypeError, ValueError) as error:
        text = str(error)
        raise ValueError(text if text.startswith(name) else f"schedule {name}: {text}") from error


def _suggest(word: str, choices: list[str]) -> str:
    near = difflib.get_close_matches(word, choices, n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""
