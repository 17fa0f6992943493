"""A run's scalars for MLflow."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_rlvr.atomic_write import write_text
from megatron_rlvr.checked_input import one_line
from megatron_rlvr.errors import UserError
from megatron_rlvr.telemetry.sinks import read_run_id

_MOST_AT_ONCE = 1000
"""Metrics in one request; MLflow's servers refuse more."""
_MOST_WAITING = 100_000
_REFUSED = re.compile(r"[^\w/.\- :]|(?<![^/])(?:\.{1,2}(?![^/])|/)|/$")
"""Characters that names of metrics must not have, and parts of a name that a path does not keep: MLflow refuses a whole
request with one such name."""


class MLflow:
    """Logs to an MLflow run at ``MLFLOW_TRACKING_URI``. A resumed run continues the run of the same run directory.

    MLflow keeps every value of a metric: steps that an interrupted process logged after the checkpoint are logged
    again, with the same values and a later time. Its names have letters, digits and ``_-./ :``, so ``pass@8`` is
    ``pass_at_8``, and other characters are their code, such as ``a_2b_b`` for ``a+b``.

    A server that does not answer costs a step a few seconds, not the run: metrics then wait for the next step.

    Args:
        run_directory: holds ``mlflow_run_id``, the id of the MLflow run.
        experiment: name of the experiment, which is created if the server has none of this name.
        name: name of the run.

    Raises:
        UserError: if mlflow is not installed, or the server refuses the experiment or does not answer.
    """

    def __init__(self, run_directory: Path, experiment: str, name: str) -> None:
        # MLflow's own limits let a request wait for many minutes.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        try:
            import mlflow
        except ImportError as error:
            raise UserError(
                "telemetry.mlflow_experiment is set but mlflow is not installed: pip install mlflow, or set it to null"
            ) from error
        self._metric, self._error = mlflow.entities.Metric, mlflow.exceptions.MlflowException
        self._waiting: list[Any] = []
        self._warned = False
        id_file = run_directory / "mlflow_run_id"
        try:
            self._client = mlflow.MlflowClient()
            if id_file.is_file():
                self._run = read_run_id(id_file, "MLflow")
                self._client.update_run(self._run, status="RUNNING")
                return
            found = self._client.get_experiment_by_name(experiment)
            number = self._client.create_experiment(experiment) if found is None else found.experiment_id
            self._run = self._client.create_run(number, run_name=name).info.run_id
        except self._error as error:
            raise UserError(
                f"telemetry.mlflow_experiment={experiment}: MLflow at {mlflow.get_tracking_uri()} cannot be used "
                f"({one_line(error)}): set MLFLOW_TRACKING_URI, remove {id_file} if its run was deleted, or set the "
                "experiment to null"
            ) from error
        write_text(id_file, f"{self._run}\n")

    def write(self, record: Mapping[str, Any]) -> None:
        now, step = int(time.time() * 1000), record["step"]
        self._waiting += [
            self._metric(_name(name), float(value), now, step)
            for name, value in record.items()
            if name != "step" and isinstance(value, int | float)
        ]
        del self._waiting[:-_MOST_WAITING]
        try:
            while self._waiting:
                self._client.log_batch(self._run, metrics=self._waiting[:_MOST_AT_ONCE])
                del self._waiting[:_MOST_AT_ONCE]
        except self._error as error:
            if not self._warned:
                self._warned = True
                print(
                    f"warning: MLflow does not take the metrics of step {step} ({one_line(error)}): they are sent with "
                    "those of later steps, once it does",
                    file=sys.stderr,
                )

    def close(self) -> None:
        try:
            self._client.set_terminated(self._run)
        except self._error as error:
            print(f"warning: MLflow was not told that the run has ended ({one_line(error)})", file=sys.stderr)


def _name(name: str) -> str:
    """Return the name of a metric as MLflow takes it."""
    return _REFUSED.sub(lambda found: "".join(f"_{ord(one):x}_" for one in found[0]), name.replace("@", "_at_"))
