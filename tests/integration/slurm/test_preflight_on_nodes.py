"""Jobs that the preflight refuses, and bad nodes that it names."""

from __future__ import annotations

import re
from pathlib import Path

from tests.integration.slurm.jobs import Job


def test_a_job_that_cannot_run_is_refused_with_the_reason(quickstart: Job, tmp_path: Path) -> None:
    quickstart.submit("model.path=/nowhere", "steps=1")
    assert quickstart.finish() == "FAILED"
    job = quickstart.cluster.job(quickstart.id)
    assert job["ExitCode"] == "2:0" and job["Restarts"] == "0"
    reason = "/nowhere/config.json cannot be read: No such file or directory (on all 2 nodes)"
    assert quickstart.history().rstrip().endswith(f"refused: preflight: {reason}")


def test_a_layout_that_does_not_divide_is_refused(quickstart: Job) -> None:
    quickstart.submit("parallel.tensor=4", "steps=1")
    assert quickstart.finish() == "FAILED"
    assert re.search(r"refused: preflight: parallel\.tensor x .* does not divide the 2", quickstart.history())


def test_a_bad_node_is_named_and_left_out(quickstart: Job, tmp_path: Path) -> None:
    cluster = quickstart.cluster
    cluster.wait_for_nodes()
    model = next(word for word in quickstart.overrides if word.startswith("model.path=")).partition("=")[2]
    (tmp_path / "empty").mkdir()
    cluster.on_node("n2", "mount", "--bind", tmp_path / "empty", model)
    try:
        quickstart.submit("steps=2", options=["--nodelist=n2", "--nodes=2"])
        cluster.wait_for_output(quickstart.id, "the next attempt leaves out n2")
        cluster.run("scontrol", "update", f"JobId={quickstart.id}", "ReqNodeList=")
        assert quickstart.finish() == "COMPLETED"
    finally:
        cluster.on_node("n2", "umount", model)
    history = quickstart.history()
    assert re.search(r"attempt 0: preflight: n2: .*config\.json cannot be read", history)
    second = re.search(r"attempt 1: try 2 from the beginning on (\S+)", history)
    assert second and "n2" not in cluster.run("scontrol", "show", "hostnames", second[1]).split()
