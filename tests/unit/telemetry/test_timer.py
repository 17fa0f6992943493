"""Where the time of a step goes."""

from __future__ import annotations

import time

import pytest

from megatron_rlvr.telemetry.timer import StepTimer


def test_step_timer_accounts_for_the_whole_step() -> None:
    timer = StepTimer()
    with timer.part("score"):
        time.sleep(0.02)
    timer.add("generate", 0.005)
    time.sleep(0.01)
    first = timer.metrics()
    assert first["time/score"] >= 0.02
    assert sum(v for k, v in first.items() if k != "time/step") == pytest.approx(first["time/step"])
    assert set(timer.metrics()) == {"time/other", "time/step"}  # nothing is carried over to the next step
