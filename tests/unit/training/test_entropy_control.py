"""What the schedule observes over the updates of a step, and which numbers the step reports."""

from __future__ import annotations

import json
from typing import Any

import pytest

from megatron_rlvr.control import SCHEDULE_PARAMETERS, ClipThresholds, SteeringResponse, build_schedule
from megatron_rlvr.errors import UserError
from megatron_rlvr.megatron.config import OptimizerConfig
from megatron_rlvr.objectives import OBJECTIVE_PARAMETERS
from megatron_rlvr.training import entropy_control
from megatron_rlvr.training.config import AlgorithmConfig
from megatron_rlvr.training.entropy_control import EntropyControl
from megatron_rlvr.training.rollout_metrics import RolloutMeasure

RESPONSE = SteeringResponse.from_sums([0.5, 2.0, 3.0, 0.3])


class RecordingSchedule:
    """A schedule whose steering is 0.1 per reported update, and which records what it is shown."""

    wants_updates = True

    def __init__(self) -> None:
        self.observed: list[tuple[int, float, dict[str, Any]]] = []
        self.updates: list[tuple[int, int, int, float | None]] = []

    def observe(self, step: int, entropy: float, **measured: Any) -> None:
        self.observed.append((step, entropy, measured))
        self.updates = []

    def observe_update(self, step: int, index: int, count: int, shift: float | None) -> None:
        self.updates.append((step, index, count, shift))

    def thresholds(self, step: int) -> ClipThresholds:
        return ClipThresholds(steering=0.1 * len(self.updates))

    def metrics(self) -> dict[str, float]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {}


@pytest.fixture
def schedule(monkeypatch: pytest.MonkeyPatch) -> RecordingSchedule:
    monkeypatch.setattr(entropy_control, "entropy_shift", lambda update, _reports: update)
    return RecordingSchedule()


def make_control(schedule: Any) -> EntropyControl:
    layout: Any = type("Layout", (), {"is_reporting_rank": True})()
    algorithm, optimizer = AlgorithmConfig(minibatches=2, epochs=2), OptimizerConfig(learning_rate=4.0)
    return EntropyControl(algorithm, optimizer, schedule, layout)


def measure(tokens: int) -> RolloutMeasure:
    return RolloutMeasure(1.5, 0.25, RESPONSE, {"tokens": float(tokens)})


def test_the_schedule_observes_the_measurements_of_every_step(schedule: RecordingSchedule) -> None:
    control = make_control(schedule)
    control.begin_step(0, measure(100), 4.0)
    control.begin_step(1, measure(50), 1.0)
    (first, second), expected = (
        schedule.observed,
        {"response": RESPONSE, "standard_error": 0.25, "momentum": 0.9, "updates": 4},
    )
    assert first == (0, 1.5, expected | {"tokens": 0, "rate": 1.0})
    assert second == (1, 1.5, expected | {"tokens": 100, "rate": 0.25})  # the rate is relative to the peak
    assert control.state_dict()["tokens_seen"] == 150


def test_updates_are_counted_from_zero_and_each_has_the_newest_steering(schedule: RecordingSchedule) -> None:
    control = make_control(schedule)
    for step in (3, 4):
        steering = [control.begin_step(step, measure(100), 4.0).thresholds.steering]
        shifts: list[Any] = [0.0, -0.01, None, -0.03]
        steering += [control.after_update(shift).thresholds.steering for shift in shifts]
        assert steering == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
        assert schedule.updates == [(step, index, 4, shift) for index, shift in enumerate(shifts)]


def test_the_predicted_entropy_change_is_that_of_the_mean_steering_in_one_minibatch(
    schedule: RecordingSchedule,
) -> None:
    control = make_control(schedule)
    control.begin_step(0, measure(100), 4.0)
    updates: list[Any] = [0.0, 0.0, 0.0, 0.0]
    for update in updates:
        control.after_update(update)
    assert control.metrics()["entropy_change/predicted"] == pytest.approx(RESPONSE.predicted(0.15) / 2)


def leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all values in nested dicts and lists, containers included."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(leaf for key, item in items for leaf in leaves(item, (*path, key)))]


def changed(state: dict[str, Any], path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    """A copy of the state with another value at a path; without it if the value is ``...``."""
    copy = json.loads(json.dumps(state))
    container = copy
    for key in path[:-1]:
        container = container[key]
    if value is ...:
        del container[path[-1]]
    else:
        container[path[-1]] = value
    return copy


@pytest.mark.parametrize("name", SCHEDULE_PARAMETERS)
def test_a_malformed_state_is_a_user_error(name: str) -> None:
    """Every entry of the state in turn is missing or of another type, as in a checkpoint that was edited."""

    def control() -> EntropyControl:
        layout: Any = type("Layout", (), {"is_reporting_rank": True})()
        bonus = OBJECTIVE_PARAMETERS["clip"](entropy_coefficient=0.1, entropy_target=0.5)
        settings = AlgorithmConfig(schedule=SCHEDULE_PARAMETERS[name](), objective=bonus)
        return EntropyControl(settings, OptimizerConfig(), build_schedule(settings.schedule, 10), layout)

    first = control()
    first.begin_step(0, measure(100), OptimizerConfig().learning_rate)
    state = json.loads(json.dumps(first.state_dict()))
    control().load_state_dict(state)
    for path in leaves(state)[1:]:
        for value in ("text", [], {}, [1.0] * 7, ...):
            if path == ("schedule", "schedule") and value == "text":
                continue  # the name of another schedule is another error
            if path == ("initial_entropy",) and value is ...:
                continue  # checkpoints of earlier versions lack it
            with pytest.raises(UserError) as error:
                control().load_state_dict(changed(state, path, value))
            text = str(error.value)
            right = "holds no state of this run (" in text or text.startswith(
                ("filter state: ", "objective state: ", "schedule state: the checkpoint's ")
            )
            assert right and "\n" not in text, (path, value, text)
