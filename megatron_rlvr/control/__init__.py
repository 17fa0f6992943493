"""What entropy control is: clip thresholds, their schedules, and the regions of tokens that raise or lower entropy.

Imports nothing of the rest of the project and nothing distributed, so that another trainer can use it as it is. Every
rank must hold the same schedule and observe the same entropy, averaged over data and context parallel ranks.
"""

from megatron_rlvr.control import regions
from megatron_rlvr.control.build import (
    SCHEDULE_PARAMETERS,
    ScheduleParameters,
    build_schedule,
    schedule_parameters,
)
from megatron_rlvr.control.curves import EntropyCurve
from megatron_rlvr.control.schedules import (
    ClipSchedule,
    Constant,
    DecreaseIncreaseDecrease,
    IncreaseThenDecrease,
    OscillatoryDecay,
)
from megatron_rlvr.control.steering import SteeringResponse
from megatron_rlvr.control.step_tokens import StepTokens
from megatron_rlvr.control.target import TargetEntropy
from megatron_rlvr.control.thresholds import AffineThreshold, ClipThresholds

__all__ = [
    "SCHEDULE_PARAMETERS",
    "AffineThreshold",
    "ClipSchedule",
    "ClipThresholds",
    "Constant",
    "DecreaseIncreaseDecrease",
    "EntropyCurve",
    "IncreaseThenDecrease",
    "OscillatoryDecay",
    "ScheduleParameters",
    "SteeringResponse",
    "StepTokens",
    "TargetEntropy",
    "build_schedule",
    "regions",
    "schedule_parameters",
]


def __dir__() -> list[str]:
    return sorted(__all__)  # without the other submodules
