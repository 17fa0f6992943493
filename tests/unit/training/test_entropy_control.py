"""What the schedule observes over the updates of a step, and which numbers the step reports."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_rlvr.control import ClipThresholds, SteeringResponse
from megatron_rlvr.megatron.config import OptimizerConfig
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
    schedule = RecordingSchedule()
    monkeypatch.setattr(entropy_control, "build_schedule", lambda *_: schedule)
    monkeypatch.setattr(entropy_control, "entropy_shift", lambda update, _reports: update)
    return schedule


def make_control() -> EntropyControl:
    layout: Any = type("Layout", (), {"is_reporting_rank": True})()
    return EntropyControl(AlgorithmConfig(minibatches=2, epochs=2), OptimizerConfig(learning_rate=4.0), 10, layout)


def measure(tokens: int) -> RolloutMeasure:
    return RolloutMeasure(1.5, 0.25, RESPONSE, {"tokens": float(tokens)})


def test_the_schedule_observes_the_measurements_of_every_step(schedule: RecordingSchedule) -> None:
    control = make_control()
    control.begin_step(0, measure(100), 4.0)
    control.begin_step(1, measure(50), 1.0)
    (first, second), expected = schedule.observed, {"response": RESPONSE, "standard_error": 0.25}
    assert first == (0, 1.5, expected | {"tokens": 0, "rate": 1.0})
    assert second == (1, 1.5, expected | {"tokens": 100, "rate": 0.25})  # the rate is relative to the peak
    assert control.state_dict()["tokens_seen"] == 150


def test_updates_are_counted_from_zero_and_each_has_the_newest_steering(schedule: RecordingSchedule) -> None:
    control = make_control()
    for step in (3, 4):
        steering = [control.begin_step(step, measure(100), 4.0).thresholds.steering]
        shifts: list[Any] = [0.0, -0.01, None, -0.03]
        steering += [control.after_update(shift).thresholds.steering for shift in shifts]
        assert steering == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
        assert schedule.updates == [(step, index, 4, shift) for index, shift in enumerate(shifts)]


def test_the_predicted_entropy_change_is_that_of_the_mean_steering_in_one_minibatch(
    schedule: RecordingSchedule,
) -> None:
    control = make_control()
    control.begin_step(0, measure(100), 4.0)
    updates: list[Any] = [0.0, 0.0, 0.0, 0.0]
    for update in updates:
        control.after_update(update)
    assert control.metrics()["entropy_change/predicted"] == pytest.approx(RESPONSE.predicted(0.15) / 2)
