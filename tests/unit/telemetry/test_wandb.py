"""W&B receives every record, although it drops rows out of order: new, stopped, killed and continued runs."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_rlvr.errors import UserError
from megatron_rlvr.telemetry.metrics import MetricsWriter
from megatron_rlvr.telemetry.sinks import WeightsAndBiases
from megatron_rlvr.train import main


class FakeRun:
    """Keeps rows as W&B does: a row is open until a later step is logged, and earlier steps are dropped."""

    def __init__(self, rows: dict[int, dict[str, Any]]):
        self.rows, self.step, self.dropped = rows, max(rows, default=-1) + 1, []  # a resumed run begins a new row

    def log(self, values: dict[str, Any], step: int) -> None:
        if step < self.step:
            self.dropped.append((step, values))
            return
        self.step = step
        self.rows.setdefault(step, {}).update(values)

    def finish(self) -> None:
        self.step = max(self.rows, default=-1) + 1


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[int, dict[str, Any]]]:
    """The rows of every W&B run by id; `import wandb` finds the fake."""
    stored: dict[str, dict[int, dict[str, Any]]] = {}

    def init(**settings: Any) -> FakeRun:
        return FakeRun(stored.setdefault(settings["id"], {}))

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    return stored


def train(
    directory: Path, first: int, steps: int, every: int, killed_after: int | None = None, stopped: bool = False
) -> None:
    """Report steps in the order of `train.py`: evaluations at the beginning of a step, and the last before metrics.

    Args:
        killed_after: the process dies after the metrics of this step, without closing anything.
        stopped: the process ends after these steps, which are not the last of the run.
    """
    writer = MetricsWriter(directory, first, tensorboard=False)
    writer.sinks.append(WeightsAndBiases(directory, {}))
    for step in range(first, steps):
        if step == 0 or step % every == 0:
            writer.write_evaluation({"step": step, "pass@1": step / 100})
        if step + 1 == steps and not stopped:
            writer.write_evaluation({"step": steps, "pass@1": steps / 100})
        writer.write({"step": step, "reward": step / 10})
        if step == killed_after:
            return
    writer.close()


def check(rows: dict[int, dict[str, Any]], steps: int, evaluated: set[int]) -> None:
    assert [row["reward"] for _, row in sorted(rows.items()) if "reward" in row] == [s / 10 for s in range(steps)]
    scores = [row["evaluation/pass@1"] for _, row in sorted(rows.items()) if "evaluation/pass@1" in row]
    assert set(scores) == {s / 100 for s in evaluated}


def _whole(directory: Path) -> None:
    train(directory, 0, 6, 2)


def _stopped(directory: Path) -> None:
    train(directory, 0, 2, 2, stopped=True)
    train(directory, 2, 6, 2)


def _killed(directory: Path) -> None:
    train(directory, 0, 6, 2, killed_after=4)
    train(directory, 2, 6, 2)


def _killed_at_the_end(directory: Path) -> None:
    train(directory, 0, 6, 2, killed_after=5)
    train(directory, 4, 6, 2)


def _continued(directory: Path) -> None:
    train(directory, 0, 3, 2)
    train(directory, 3, 4, 2)
    train(directory, 4, 6, 2)


def _continued_and_killed(directory: Path) -> None:
    train(directory, 0, 4, 2)
    train(directory, 4, 6, 2, killed_after=4)
    train(directory, 4, 6, 2)


@pytest.mark.parametrize(
    ("story", "evaluated"),
    [
        (_whole, {0, 2, 4, 6}),
        (_stopped, {0, 2, 4, 6}),
        (_killed, {0, 2, 4, 6}),
        (_killed_at_the_end, {0, 2, 4, 6}),
        (_continued, {0, 2, 3, 4, 6}),
        (_continued_and_killed, {0, 2, 4, 6}),
    ],
)
def test_no_step_and_no_evaluation_is_dropped(
    story: Callable[[Path], None],
    evaluated: set[int],
    tmp_path: Path,
    runs: dict[str, dict[int, dict[str, Any]]],
) -> None:
    story(tmp_path)
    [rows] = runs.values()
    check(rows, 6, evaluated)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"two words", b"x" * 300])
def test_a_damaged_id_is_one_line(content: bytes, tmp_path: Path, runs: dict[str, dict[int, dict[str, Any]]]) -> None:
    (tmp_path / "wandb_run_id").write_bytes(content)
    (tmp_path / "wandb_evaluation_rows").write_bytes(b"\xff 3")
    with pytest.raises(UserError, match=r"wandb_run_id is damaged: found .*or remove the file to begin a new run"):
        WeightsAndBiases(tmp_path, {})
    (tmp_path / "wandb_run_id").unlink()
    WeightsAndBiases(tmp_path, {})
    assert [(tmp_path / "wandb_run_id").read_text()] == list(runs)
    assert not list(tmp_path.glob(".*"))  # no temporary file is left


def test_wandb_that_refuses_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class RefusedError(Exception):
        pass

    def init(**_settings: Any) -> None:
        raise RefusedError("No API key configured.\nUse `wandb login`")

    errors = types.SimpleNamespace(Error=RefusedError)
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init, errors=errors))
    with pytest.raises(UserError, match=r"project=p: W&B cannot be used \(No API key configured. Use") as error:
        WeightsAndBiases(tmp_path, {"project": "p"})
    assert "\n" not in str(error.value)


def test_the_trainer_loses_no_step(
    run_yaml: Path, tmp_path: Path, runs: dict[str, dict[int, dict[str, Any]]], capsys: pytest.CaptureFixture[str]
) -> None:
    """With held-out data, through the program itself, and again when the finished run is continued."""
    for steps in (2, 3):
        assert main([str(run_yaml), f"steps={steps}", "telemetry.wandb_project=study", "evaluation.every=2"]) == 0
    [rows] = runs.values()
    written = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["reward"] for _, row in sorted(rows.items()) if "reward" in row] == [row["reward"] for row in written]
    evaluations = [json.loads(line) for line in (tmp_path / "run" / "evaluations.jsonl").read_text().splitlines()]
    scores = {row["evaluation/pass@1"] for row in rows.values() if "evaluation/pass@1" in row}
    assert [line["step"] for line in evaluations] == [0, 2, 3] and scores == {line["pass@1"] for line in evaluations}


def test_tensorboard_keeps_the_evaluation_of_the_step_that_a_run_resumes_from(tmp_path: Path) -> None:
    for first, steps in ((0, 3), (3, 5)):
        with MetricsWriter(tmp_path, first) as writer:
            for step in range(first, steps):
                writer.write({"step": step, "reward": step / 4})
            writer.write_evaluation({"step": steps, "pass@1": steps / 8})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("evaluation/pass@1")] == [(3, 0.375), (5, 0.625)]
    assert [e.step for e in events.Scalars("reward")] == [0, 1, 2, 3, 4]
