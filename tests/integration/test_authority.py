"""examples/entropy_study/authority.py, on the checkpoints of a short run."""

from __future__ import annotations

from pathlib import Path

import authority
import measurements

from megatron_rlvr.train import main

RATE = 1e-2


def test_thresholds_are_compared_from_the_same_state(run_yaml: Path, tmp_path: Path) -> None:
    common = [str(run_yaml), "algorithm.schedule.name=constant", "data.heldout=null", "steps=2", "checkpoint.keep=9"]
    assert main(common) == 0
    table = tmp_path / "authority.csv"
    arguments = [str(tmp_path / "run"), f"--rates={RATE}", f"--output={table}", "--rewards", "coin", "--passes"]
    authority.main([*arguments, "1"])
    once = measurements.read(table)
    states = sorted({m.step for m in once})
    assert len(states) == 2
    assert [(m.step, m.bound, m.passes) for m in once] == [(s, b, 1) for s in states for b in measurements.BOUNDS]
    assert len({m.entropy for m in once}) == len(states)  # all thresholds of a state start from the same entropy
    assert all(m.shift != 0.0 for m in once)
    for step in states:
        clipped = {m.bound: m.clipped_high for m in once if m.step == step}
        assert clipped["static"] > clipped["steep"]  # which reaches a ratio of 4

    # What the table holds is not measured again, and the measurements are the same in any order.
    authority.main([*arguments, "1", "2"])
    twice = measurements.read(table)
    assert twice[: len(once)] == once
    assert [(m.step, m.bound, m.passes) for m in twice[len(once) :]] == [(m.step, m.bound, 2) for m in once]
    authority.main([*arguments, "1", "2"])
    assert measurements.read(table) == twice
    other = tmp_path / "other.csv"
    authority.main([str(tmp_path / "run"), f"--output={other}", *arguments[1:2], *arguments[3:], "1", "2"])
    assert set(measurements.read(other)) == set(twice)
