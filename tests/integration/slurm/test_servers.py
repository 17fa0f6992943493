"""SGLang servers of a job, on separate nodes and on the training nodes.

A deterministic stand-in replaces SGLang, whose completions on the CPU are random.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from tests.integration.slurm.jobs import Job, with_stand_in_servers

STEPS = 5


def test_both_placements_and_a_killed_server_give_the_same_run(quickstart: Job, tmp_path: Path) -> None:
    colocated = with_stand_in_servers(quickstart)
    split = replace(colocated, run=tmp_path / "split", variables={"RLVR_SERVERS": "nodes:1"})
    split.submit(f"steps={STEPS}", options=["--nodes=3"])
    split.wait_for_steps(2)
    split.kill_server()
    assert split.finish() == "COMPLETED"
    log = split.run / "slurm" / f"{split.id}.0" / "servers" / "n3" / "server_0.log"
    assert log.is_file()
    assert [file.name for file in log.parents[1].glob("*.urls")] == ["n3.urls"]
    (urls,) = re.findall(r"SGLang servers: (\S+)\n", split.cluster.output(split.id))
    assert urls == (log.parents[1] / "n3.urls").read_text().strip()

    colocated.variables = {"RLVR_SERVERS": "colocated"}
    colocated.submit(f"steps={STEPS}")
    assert colocated.finish() == "COMPLETED"
    (urls,) = re.findall(r"SGLang servers: (\S+)\n", colocated.cluster.output(colocated.id))
    folder = colocated.run / "slurm" / f"{colocated.id}.0" / "servers"
    assert urls.split(",") == [(folder / f"n{node}.urls").read_text().strip() for node in (1, 2)]
    assert len(split.metrics()) == STEPS
    assert split.metrics() == colocated.metrics()


def test_servers_that_do_not_start_end_the_attempt_with_the_reason(quickstart: Job, tmp_path: Path) -> None:
    job = with_stand_in_servers(quickstart)
    broken = [*job.overrides, "rollout.sglang.environment.PYTHONPATH=/nowhere"]
    job = replace(job, overrides=broken, variables={"RLVR_SERVERS": "colocated", "RLVR_MAX_TRIES": "1"})
    job.submit(f"steps={STEPS}")
    assert job.finish() == "FAILED"
    assert re.search(r"failed: the SGLang servers ended: error: .*server_0\.log, which says: ", job.history())
