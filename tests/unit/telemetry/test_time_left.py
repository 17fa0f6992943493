"""The estimated time of the rest of a run, on a clock that only the simulated run advances."""

from __future__ import annotations

import random
from typing import Any

import pytest

from megatron_rlvr.telemetry.status import StatusWriter, read_status
from megatron_rlvr.telemetry.time_left import PeriodicWork, TimeLeft


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr("megatron_rlvr.telemetry.time_left.time.monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def run(
    clock: Clock,
    work: PeriodicWork,
    steps: int,
    first: int = 0,
    history: list[dict[str, Any]] | None = None,
    evaluation: float = 60.0,
    checkpoint: float = 5.0,
    slow: int = 2,
    seed: int = 0,
) -> tuple[list[float], list[dict[str, Any]]]:
    """Simulate the loop of `train.py`; returns what was estimated after each step minus what the rest then took.

    The first `slow` steps of the process take 3 and 1.5 times as long as the others, which take 10 s +- 10 %.
    """
    draw = random.Random(seed)
    estimate = TimeLeft(steps, work, history or ())
    estimates, records, began = [], [], clock.now
    saving = 0.0
    for step in range(first, steps):
        record: dict[str, Any] = {"step": step}
        seconds = 10.0 * draw.uniform(0.9, 1.1) * dict(enumerate((3.0, 1.5)[:slow])).get(step - first, 1.0)
        due = work.evaluates and (step == 0 or (work.evaluation_every and step % work.evaluation_every == 0))
        if evaluating := evaluation * (due + (work.evaluates and step + 1 == steps)):
            record["time/evaluate"] = evaluating
        if saving:
            record["time/checkpoint"] = saving
        clock.now += seconds + evaluating
        estimate.step_ended(record)
        records.append(record)
        estimates.append((clock.now, estimate.at_last_end()))
        saved = step + 1 == steps or (work.checkpoint_every and (step + 1) % work.checkpoint_every == 0)
        saving = checkpoint if saved else 0.0
        clock.now += saving
    total = clock.now - began
    return [(left - (clock.now - now)) / total for now, left in estimates], records


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(
    "work",
    [
        PeriodicWork(),
        PeriodicWork(True),
        PeriodicWork(True, 16, 8),
        PeriodicWork(True, 7, 1),
        PeriodicWork(False, 5, 20),
    ],
)
@pytest.mark.parametrize("steps", [40, 64])
def test_the_estimate_holds_after_the_first_tenth(clock: Clock, work: PeriodicWork, steps: int, seed: int) -> None:
    """The first step is three times as slow, and an evaluation takes as long as six steps."""
    errors, _ = run(clock, work, steps, seed=seed)
    assert max(map(abs, errors[steps // 10 :])) < 0.12
    assert max(map(abs, errors[steps // 4 :])) < 0.06


def test_evaluations_and_checkpoints_are_counted_exactly(clock: Clock) -> None:
    for total in (1, 2, 9, 20):
        for work in (PeriodicWork(), PeriodicWork(True, 0, 3), PeriodicWork(True, 4, 5), PeriodicWork(True, 1, 1)):
            evaluated = [
                s for s in range(total) if s == 0 or (work.evaluation_every and s % work.evaluation_every == 0)
            ]
            saved = [
                s
                for s in range(1, total + 1)
                if s == total or (work.checkpoint_every and s % work.checkpoint_every == 0)
            ]
            for finished in range(1, total + 1):
                left = sum(s >= finished for s in evaluated) + (finished < total)
                assert work.evaluations_left(finished, total) == (left if work.evaluates else 0)
                assert work.checkpoints_left(finished, total) == sum(s >= finished for s in saved)


def test_a_resumed_run_knows_the_evaluations_of_earlier_processes(clock: Clock) -> None:
    work = PeriodicWork(True, 32, 16)
    _, records = run(clock, work, 64)
    known, _ = run(clock, work, 64, first=40, history=records[:40], slow=0)
    unknown, _ = run(clock, work, 64, first=40, slow=0)
    assert max(map(abs, known)) < 0.05 < 0.1 < max(map(abs, unknown))


def test_one_step_that_waited_does_not_count_for_all(clock: Clock) -> None:
    estimate = TimeLeft(100)
    for step in range(10):
        clock.now += 1000.0 if step == 6 else 10.0
        estimate.step_ended({"step": step})
    assert estimate.at_last_end() == pytest.approx(90 * 10, rel=0.15)


def test_the_estimate_counts_down_within_a_step(clock: Clock, tmp_path) -> None:
    writer = StatusWriter(tmp_path, "run", 3, 0)
    for step in range(2):
        clock.now += 50.0
        writer.step({"step": step})
    assert read_status(tmp_path).seconds_left == 50.0
    clock.now += 20.0
    writer.phase("updating")
    assert read_status(tmp_path).seconds_left == 30.0
    clock.now += 90.0
    writer.phase("saving")
    assert read_status(tmp_path).seconds_left == 0.0
