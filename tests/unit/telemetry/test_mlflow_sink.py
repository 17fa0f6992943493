"""MLflow receives every record, on a fake client and on the package where it is installed."""

from __future__ import annotations

import importlib.util
import posixpath
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from megatron_rlvr.errors import UserError
from megatron_rlvr.telemetry.metrics import MetricsWriter
from megatron_rlvr.telemetry.mlflow_sink import MLflow


class MlflowError(Exception):
    """What the fake raises in the place of MlflowException."""


class FakeServer:
    """The calls of MlflowClient that the sink makes. `down` makes all of them fail."""

    def __init__(self) -> None:
        self.down, self.status, self.batches = False, {}, []
        self.experiments: dict[str, str] = {}

    def answers(self) -> None:
        if self.down:
            raise MlflowError("connection refused\nby the server")

    def get_experiment_by_name(self, name: str) -> Any:
        self.answers()
        number = self.experiments.get(name)
        return None if number is None else types.SimpleNamespace(experiment_id=number)

    def create_experiment(self, name: str) -> str:
        return self.experiments.setdefault(name, str(len(self.experiments)))

    def create_run(self, experiment_id: str, run_name: str) -> Any:
        run = f"{experiment_id}-{run_name}-{len(self.status)}"
        self.status[run] = "RUNNING"
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id=run))

    def update_run(self, run: str, status: str) -> None:
        self.answers()
        if run not in self.status:
            raise MlflowError(f"no run {run}")
        self.status[run] = status

    def log_batch(self, run: str, metrics: list[Any]) -> None:
        self.answers()
        assert len(metrics) <= 1000 and all("@" not in name for name, *_ in metrics)
        self.batches.append((run, metrics))

    def set_terminated(self, run: str) -> None:
        self.answers()
        self.status[run] = "FINISHED"

    def values(self, name: str) -> list[tuple[int, float]]:
        return [(step, value) for _, batch in self.batches for key, value, _, step in batch if key == name]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> FakeServer:
    server = FakeServer()
    module = types.SimpleNamespace(
        MlflowClient=lambda: server,
        entities=types.SimpleNamespace(Metric=lambda *values: values),
        exceptions=types.SimpleNamespace(MlflowException=MlflowError),
        get_tracking_uri=lambda: "http://tracking:5000",
    )
    monkeypatch.setitem(sys.modules, "mlflow", module)
    return server


def train(directory: Path, first: int, steps: int, sink: MLflow) -> None:
    with MetricsWriter(directory, first, tensorboard=False) as writer:
        writer.sinks.append(sink)
        writer.write_evaluation({"step": first, "pass@8": first / 8})
        for step in range(first, steps):
            writer.write({"step": step, "reward": step / 4, "loss": float("nan")})


def test_a_resumed_run_continues_its_mlflow_run(tmp_path: Path, server: FakeServer) -> None:
    train(tmp_path, 0, 3, MLflow(tmp_path, "study", "one"))
    assert server.status == {"0-one-0": "FINISHED"}
    sink = MLflow(tmp_path, "study", "one")
    assert server.status == {"0-one-0": "RUNNING"}
    train(tmp_path, 3, 5, sink)
    assert {run for run, _ in server.batches} == {"0-one-0"}
    assert server.values("reward") == [(step, step / 4) for step in range(5)]
    assert server.values("evaluation/pass_at_8") == [(0, 0.0), (3, 0.375)]
    MLflow(tmp_path.parent, "study", "other")
    assert server.experiments == {"study": "0"}  # found, not created twice


def test_every_name_is_one_that_mlflow_takes(tmp_path: Path, server: FakeServer) -> None:
    """MLflow refuses a request for one name, and with it the metrics of all later steps."""
    names = ["reward/a+b", "reward/a_b", "reward/.", "reward/../x", "reward/.a", "a//b", "a/", "pass@8", "reward/é (1)"]
    MLflow(tmp_path, "study", "one").write({"step": 0, **dict.fromkeys(names, 1.0)})
    [(_, batch)] = server.batches
    taken = [name for name, *_ in batch]
    assert len({*taken}) == len(names) and {"pass_at_8", "reward/a_b", "reward/.a"} <= {*taken}
    for name in taken:  # as in mlflow.utils.validation
        assert re.fullmatch(r"[/\w.\- :]*", name) and posixpath.normpath(name) == name and not name.startswith("..")


def test_metrics_wait_for_a_server_that_is_down(
    tmp_path: Path, server: FakeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    sink = MLflow(tmp_path, "study", "one")
    server.down = True
    for step in range(400):
        sink.write({"step": step, **{f"m{i}": float(i) for i in range(4)}})
    warning = capsys.readouterr().err
    assert len(warning.splitlines()) == 1 and "connection refused by the server" in warning
    server.down = False
    sink.write({"step": 400, "m0": 0.0})
    assert [step for step, _ in server.values("m0")] == list(range(401)) and len(server.batches) == 2


def test_a_server_that_refuses_the_run_is_an_error_before_training(tmp_path: Path, server: FakeServer) -> None:
    server.down = True
    with pytest.raises(UserError, match=r"study: MLflow at http://tracking:5000 .*refused by the server.*: set MLFLOW"):
        MLflow(tmp_path, "study", "one")
    server.down = False
    (tmp_path / "mlflow_run_id").write_text("deleted\n")
    with pytest.raises(UserError, match=r"no run deleted.* remove .*mlflow_run_id if its run was deleted"):
        MLflow(tmp_path, "study", "one")


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(UserError, match="mlflow is not installed: pip install mlflow"):
        MLflow(tmp_path, "study", "one")


@pytest.mark.skipif(importlib.util.find_spec("mlflow") is None, reason="mlflow is not installed")
def test_the_package_takes_the_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    import mlflow

    for first, steps in ((0, 3), (3, 5)):
        train(tmp_path, first, steps, MLflow(tmp_path, "study", "one"))
    client = mlflow.MlflowClient()
    run = client.get_run((tmp_path / "mlflow_run_id").read_text().strip())
    assert run.info.status == "FINISHED" and run.info.run_name == "one"
    history = client.get_metric_history(run.info.run_id, "reward")
    assert [(metric.step, metric.value) for metric in history] == [(step, step / 4) for step in range(5)]
    assert run.data.metrics["evaluation/pass_at_8"] == 0.375
