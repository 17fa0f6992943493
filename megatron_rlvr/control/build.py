"""Schedules by name: from the ``name`` and parameters in a configuration to a schedule of a given length."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any

from megatron_rlvr.control.bounds import Within
from megatron_rlvr.control.by_name import check_name, check_parameters, parameters_dataclass
from megatron_rlvr.control.curves import EntropyCurve
from megatron_rlvr.control.schedules import (
    ClipSchedule,
    Constant,
    DecreaseIncreaseDecrease,
    IncreaseThenDecrease,
    OscillatoryDecay,
)
from megatron_rlvr.control.sign_weights import Entrocraft, EntroPIC
from megatron_rlvr.control.target import TargetEntropy

# Thresholds alone follow the course that the paper's schedule is named for. Their amplitude, a share of the steep
# thresholds, follows from their measured effect.
CLOSED_LOOP = {
    "curve": "piecewise",
    "steering_limit": 0.0,
    "upper_intercept": 3.0,
    "upper_slope": -2.8,
    "lower_intercept": 0.7,
    "lower_slope": -0.5,
}
# name -> (class, values that the name stands for and a configuration may override)
SCHEDULES: dict[str, tuple[type[ClipSchedule], dict[str, Any]]] = {
    "constant": (Constant, {}),
    "clip-higher": (Constant, {"upper_intercept": 0.28}),
    "increase-then-decrease": (IncreaseThenDecrease, {}),
    "decrease-increase-decrease": (DecreaseIncreaseDecrease, {}),
    "oscillatory-decay": (OscillatoryDecay, {}),
    "target-entropy": (TargetEntropy, {}),
    "entropy-floor": (TargetEntropy, {"floor_only": True, "start": 0.6}),
    "closed-increase-then-decrease": (
        TargetEntropy,
        {**CLOSED_LOOP, "points": [[0.0, 1.0], [0.5, 1.2], [1.0, 0.6]]},
    ),
    "closed-decrease-increase-decrease": (
        TargetEntropy,
        {**CLOSED_LOOP, "points": [[0.0, 1.0], [0.25, 0.8], [0.6, 1.0], [1.0, 0.6]]},
    ),
    "entrocraft": (Entrocraft, {}),
    "entropic": (EntroPIC, {}),
}
CURVE_PARAMETERS = [f.name for f in fields(EntropyCurve)]


@dataclass
class ScheduleParameters:
    """A schedule's ``name`` and parameters, with types and defaults.

    Each name has a subclass in ``SCHEDULE_PARAMETERS``, which adds the fields of the schedule itself.
    """

    name: str
    total_steps: Annotated[int, Within(1, includes_low=True, cap=2**31 - 1)] | None = None
    """Steps over which the schedule runs from its start to its end; later steps keep the thresholds and targets of its
    end. Null means the ``steps`` that the run is first started with, so that a run that is continued with more steps
    does not stretch its schedule. Constant schedules ignore it."""


def _follows_curve(schedule_class: type) -> bool:
    return any(f.name == "curve" for f in fields(schedule_class))


def _parameters(name: str, schedule_class: type, preset: Mapping[str, Any]) -> type[ScheduleParameters]:
    """The subclass of ScheduleParameters for ``name``.

    The curve's parameters are on the same level as the schedule's, because a configuration lists both together.
    """
    sources = [(schedule_class, f) for f in fields(schedule_class) if f.init and f.name not in ("total_steps", "curve")]
    if _follows_curve(schedule_class):
        sources = [(EntropyCurve, f) for f in fields(EntropyCurve)] + sources
    parameters = [(source, f, f.name) for source, f in sources]
    return parameters_dataclass(ScheduleParameters, name, schedule_class, parameters, preset)


SCHEDULE_PARAMETERS: dict[str, type[ScheduleParameters]] = {
    name: _parameters(name, schedule_class, preset) for name, (schedule_class, preset) in SCHEDULES.items()
}


def schedule_parameters(name: str) -> list[str]:
    """The parameters that a configuration may give the schedule ``name``. Raises ValueError for an unknown name."""
    check_name("schedule", name, SCHEDULES)
    return [f.name for f in fields(SCHEDULE_PARAMETERS[name]) if f.name != "name"]


def has_end(name: str) -> bool:
    """Whether the schedule ``name`` changes over a number of steps; constant schedules do not."""
    return any(f.name == "total_steps" for f in fields(SCHEDULES[name][0]))  # type: ignore[arg-type]


def build_schedule(config: Mapping[str, Any] | ScheduleParameters, total_steps: int) -> ClipSchedule:
    """Build the schedule that ``config`` describes, for a run of ``total_steps`` steps.

    ``config`` is ``{"name": ..., parameter: value, ...}`` or a ScheduleParameters. Its ``total_steps``, if it is set,
    replaces the argument ``total_steps``.
    Raises ValueError, in one line that names the valid choices, for an unknown name, an unknown parameter or an
    impossible value.
    """
    if isinstance(config, ScheduleParameters):
        config = dataclasses.asdict(config)
    if "name" not in config:
        raise ValueError(f"schedule: no name given; valid: {', '.join(SCHEDULES)}")
    parameters = {str(key): value for key, value in config.items() if key != "name"}
    name = str(config["name"])
    check_parameters(f"schedule {name}", parameters, schedule_parameters(name))
    schedule_class, preset = SCHEDULES[name]
    parameters = {**preset, **parameters}
    own_total = parameters.pop("total_steps", None)
    if has_end(name):
        parameters["total_steps"] = total_steps if own_total is None else own_total
    try:
        if _follows_curve(schedule_class):
            curve = {key: parameters.pop(key) for key in CURVE_PARAMETERS if key in parameters}
            parameters["curve"] = EntropyCurve(**curve)
        return schedule_class(**parameters)
    except (TypeError, ValueError) as error:
        text = str(error)
        raise ValueError(text if text.startswith(name) else f"schedule {name}: {text}") from error
