"""status.json, and the table of runs that tools/status.py prints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import status as tool

from megatron_rlvr.errors import UserError
from megatron_rlvr.telemetry.status import STATUS_FILE, StatusWriter, read_status

RECORD = {"step": 4, "reward": 0.5, "entropy": 0.25, "control/target": 0.3, "tokens": 1000}


def test_status_after_a_step(tmp_path: Path) -> None:
    writer = StatusWriter(tmp_path, "run", 10, first_step=4)
    assert read_status(tmp_path).checkpoint == 4
    writer.step(RECORD)
    writer.saved(5)
    status = read_status(tmp_path)
    assert (status.step, status.steps, status.reward, status.entropy, status.entropy_target) == (5, 10, 0.5, 0.25, 0.3)
    assert status.checkpoint == 5 and status.state == "running"
    assert status.tokens_per_second == pytest.approx(1000 / status.step_seconds)
    assert status.seconds_left == pytest.approx(5 * status.step_seconds)
    assert not list(tmp_path.glob("*.partial"))


def test_values_that_are_not_finite_stay_valid_json(tmp_path: Path) -> None:
    StatusWriter(tmp_path, "run", 10, 0).step({"step": 0, "reward": float("nan"), "entropy": float("inf")})
    text = (tmp_path / STATUS_FILE).read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert read_status(tmp_path).reward is None


def test_table_of_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("one", "two", "queued"):
        (tmp_path / name).mkdir()
    one = StatusWriter(tmp_path / "one", "one", 10, 0)
    one.step(RECORD)
    one.phase("updating")
    StatusWriter(tmp_path / "two", "two", 10, 0).ended("failed", "ValueError: too hot")
    (tmp_path / "queued" / "slurm").mkdir()
    (tmp_path / "queued" / "slurm" / "history").write_text("first\nexcluded n2\n")
    assert tool.main([str(tmp_path / name) for name in ("one", "two", "queued")]) == 0
    heading, first, second, third = capsys.readouterr().out.splitlines()
    assert heading.split()[:4] == ["run", "state", "step", "reward"]
    assert first.split()[1:6] == ["updating", "5/10", "0.500", "0.250", "0.300"]
    assert "failed" in second and "too hot" in second
    assert "waiting" in third and third.endswith("excluded n2")


def test_run_without_recent_status_is_silent(tmp_path: Path) -> None:
    status = StatusWriter(tmp_path, "run", 10, 0).status
    assert tool.state(status, 60.0) == "starting"
    assert tool.state(status, 600.0) == "silent"
    status.step_seconds = 300.0
    assert tool.state(status, 600.0) == "starting"


def test_directory_without_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="no status"):
        read_status(tmp_path)
    assert tool.main([str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("error: no status.json")


def test_waiting_runs_and_other_folders(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "queued" / "slurm").mkdir(parents=True)
    (tmp_path / "queued" / "slurm" / "history").write_text("job 7 attempt 0: try 1\n")
    assert tool.main([str(tmp_path / "data"), str(tmp_path / "queued")]) == 0
    _, other_folder, queued = capsys.readouterr().out.splitlines()
    assert other_folder.split()[1:3] == ["no", "run"] and "waiting" in queued

    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tool.time, "sleep", interrupt)
    assert tool.main([str(tmp_path / "not_yet"), "--watch", "1"]) == 0
    assert "no run" in capsys.readouterr().out
