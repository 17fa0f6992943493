"""A job with a real SGLang server on each training node, which receives the weights from that node's processes."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest

from tests.integration.slurm.jobs import Job
from tests.processes import ROOT

STEPS = 5
PYTHON = Path(os.environ.get("SGLANG_PYTHON", ROOT / ".venv-sglang" / "bin" / "python"))


def with_real_servers(job: Job, placement: str) -> Job:
    """Return the job with real SGLang servers, two processes per training node, and no copy of the weights on disk."""
    if not PYTHON.is_file():
        pytest.skip(f"no SGLang environment at {PYTHON}: run `make sglang`, or set SGLANG_PYTHON to another Python")
    settings = [
        f"rollout.sglang.python={PYTHON}",
        "rollout.sglang.server.max_total_tokens=8192",
        "rollout.sglang.start_timeout_seconds=1000",
        "rollout.sglang.health_timeout_seconds=200",
        "rollout.sglang.recovery_copy=false",
        "rollout.sglang.bucket_mb=1",
        "rollout.record=true",
        "optimizer.learning_rate=3.0e-3",
        "parallel.tensor=2",
    ]
    variables = {"RLVR_SERVERS": placement, "RLVR_PROCESSES_PER_NODE": "2", "RLVR_SERVER_SECONDS": "1000"}
    return replace(job, overrides=[*job.overrides, *settings], variables=variables)


def check(job: Job, nodes: list[str], transport: str) -> None:
    """All steps used the newest weights, as the trainer has them, and no weights went through the disk."""
    metrics = job.metrics()
    assert len(metrics) == STEPS
    # A step changes the weights by more than the tolerance.
    assert all(record["ratio_max"] > 1.001 for record in metrics)
    assert all(record["mismatch/max"] < 1e-4 for record in metrics), [record["mismatch/max"] for record in metrics]
    for step in range(STEPS):
        files = list((job.run / "rollouts" / f"step_{step:06d}").glob("*.jsonl"))
        assert len(files) == 8
        rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
        assert {row["weight_version"] for row in rows} == {step}
    assert not (job.run / "sglang" / "weights").exists()
    logs = max((job.run / "slurm").glob(f"{job.id}.*")) / "servers"
    assert sorted(path.stem for path in logs.glob("*.json")) == nodes
    for node in nodes:
        log = (logs / node / "server_0.log").read_text()
        assert len(re.findall(rf"POST /update_weights_from_{transport} .* 200", log)) >= STEPS
        assert log.count("POST /update_weights_from_disk") <= 1  # the model that training starts from
        assert "POST /generate" in log


@pytest.mark.timeout(2700)
def test_each_node_updates_its_own_server(quickstart: Job) -> None:
    job = with_real_servers(quickstart, "colocated")
    job.submit(f"steps={STEPS}")
    assert job.finish() == "COMPLETED", job.history()
    check(job, ["n1", "n2"], "tensor")
