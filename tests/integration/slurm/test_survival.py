"""The quickstart as a job of two nodes through the very example script, and what happens to it."""

from __future__ import annotations

import os
import re
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_rlvr.telemetry.status import read_status
from tests.conftest import ROOT
from tests.integration.slurm.cluster import Cluster
from tests.integration.slurm.jobs import Job, wait_until

pytestmark = pytest.mark.timeout(400)

STEPS = 16
SCRIPT = ROOT / "examples" / "slurm" / "quickstart-cpu.sbatch"


@pytest.fixture(scope="module")
def uninterrupted(cluster: Cluster, settings, tmp_path_factory: pytest.TempPathFactory) -> Job:  # type: ignore[no-untyped-def]
    """A finished job to compare with, and to evaluate."""
    with pytest.MonkeyPatch.context() as patch:
        from tests.integration.slurm.conftest import set_job_environment

        set_job_environment(patch)
        job = Job(cluster, SCRIPT, tmp_path_factory.mktemp("uninterrupted") / "run", settings.overrides())
        # On a machine that does something else besides, these times say nothing about ours.
        busy = os.getloadavg()[0] > (os.cpu_count() or 1)
        began = time.monotonic()
        job.submit(f"steps={STEPS}")
        job.wait_for_steps(1)
        first = time.monotonic() - began
        assert job.finish() == "COMPLETED"
    preflight = float(re.search(r"preflight: all nodes are fit \((.*) s\)", cluster.output(job.id))[1])  # type: ignore[index]
    print(f"\nfrom sbatch to the first step {first:.1f} s, of which preflight {preflight:.1f} s")
    if not busy:
        assert first < 60 and preflight < 15
    return job


def test_it_runs_and_says_how_it_is_doing(uninterrupted: Job, job_environment: None) -> None:
    assert [record["step"] for record in uninterrupted.metrics()] == list(range(STEPS))
    status = read_status(uninterrupted.run)
    assert (status.state, status.step, status.checkpoint) == ("done", STEPS, STEPS)
    assert status.slurm_job == uninterrupted.id
    table = uninterrupted.cluster.run(sys.executable, ROOT / "tools" / "status.py", uninterrupted.run)
    assert re.search(rf"done +{STEPS}/{STEPS} .* step_{STEPS} .* done$", table.strip())
    logs = uninterrupted.run / "slurm" / f"{uninterrupted.id}.0"
    assert "step  1/16" in (logs / "rank_0.log").read_text() and (logs / "rank_1.log").is_file()


def test_signal_then_a_lost_node_equal_the_uninterrupted_run(uninterrupted: Job, quickstart: Job) -> None:
    quickstart.submit(f"steps={STEPS}")
    quickstart.wait_for_steps(3)
    first = quickstart.nodes()
    quickstart.signal_before_the_limit()
    quickstart.wait_for_steps_after_resuming(2)
    quickstart.lose_node(first[1])
    assert quickstart.finish() == "COMPLETED"
    quickstart.cluster.start_node(first[1])
    assert quickstart.metrics() == uninterrupted.metrics()
    history = quickstart.history()
    assert "stopped (USR1); the newest checkpoint is step_" in history
    attempts = re.findall(r"attempt (\d): try \d from (.*) on (\S+)", history)
    assert [number for number, _, _ in attempts] == ["0", "1", "2"]
    assert attempts[0][1] == "the beginning" and first[1] not in attempts[2][2].split(",")


def test_killed_batch_script_and_killed_rank(uninterrupted: Job, quickstart: Job) -> None:
    quickstart.submit(f"steps={STEPS}")
    quickstart.wait_for_steps(2)
    quickstart.kill_batch_script()
    quickstart.wait_for_steps_after_resuming(2)
    quickstart.kill_rank(quickstart.nodes()[1])
    assert quickstart.finish() == "COMPLETED"
    assert quickstart.metrics() == uninterrupted.metrics()
    assert re.search(r"attempt 1: failed: rank 1 on n\d+ ended of SIGKILL", quickstart.history())


def test_evaluation_of_a_checkpoint(uninterrupted: Job, tmp_path: Path, job_environment: None) -> None:
    problems = next(word for word in uninterrupted.overrides if word.startswith("data.train="))
    job = replace(uninterrupted, script=ROOT / "examples" / "slurm" / "evaluate.sbatch", id="")
    arguments = [
        uninterrupted.run,
        problems.replace("data.train", "data.heldout"),
        "evaluation.prompts=8",
        "evaluation.samples=2",
    ]
    variables = {"RLVR_PROCESSES_PER_NODE": "2"}  # its nodes have GPUs in name only
    job.id = job.cluster.submit(job.script, *arguments, f"run_directory={tmp_path / 'job'}", **variables)
    assert job.finish() == "COMPLETED", job.cluster.output(job.id)
    assert '"step": 16' in (uninterrupted.run / "evaluation_step_16.json").read_text()


# What needs no training: a Python that pretends ----------------------------------------------------------------------

PRETENDER = """#!/bin/bash
# The preflight is content; everything else does what $PRETEND says.
case "$*" in
    *cluster.preflight*)
        report=$(tr ' ' '\\n' <<< "$*" | sed -n 's/^--report=//p')
        mkdir -p "$report" && echo "0 fine" > "$report/verdict" ;;
    *) eval "$PRETEND" ;;
esac
"""


@pytest.fixture
def pretender(cluster: Cluster, tmp_path: Path, job_environment: None, monkeypatch: pytest.MonkeyPatch) -> Job:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text(PRETENDER)
    (tmp_path / "bin" / "python").chmod(0o755)
    monkeypatch.setenv("RLVR_ENVIRONMENT", f"venv:{tmp_path}")
    return Job(cluster, SCRIPT, tmp_path / "run", ["model.path=none"])


def test_crash_loop_ends_with_the_reason(pretender: Job) -> None:
    reason = "rank 3 on n2 ended of SIGSEGV: its last words"
    said = f'said="139 {reason}"; [ "$SLURM_PROCID" = 1 ] || said="1 rank 0 on n1 ended with status 1: lost its peer"'
    outcome = 'for w in "$@"; do case $w in --logs=*) echo "$said" > ${w#*=}/outcome.$SLURMD_NODENAME; esac; done'
    pretender.submit(RLVR_MAX_TRIES="2", PRETEND=f"{said}; {outcome}; sleep 0.5; exit ${{said%% *}}")
    assert pretender.finish() == "FAILED"
    history = pretender.history()
    assert len(re.findall(rf"attempt \d: failed: {reason}", history)) == 2
    assert history.rstrip().endswith(
        f"gave up: 2 attempts from the beginning ended without a new checkpoint, the last because of: {reason}"
    )


def test_cancelled_job_stays_cancelled(pretender: Job) -> None:
    pretender.submit(PRETEND="sleep 1000")
    pretender.cluster.wait_for_output(pretender.id, "try 1 from")
    wait_until(lambda: bool(pretender.cluster.processes(pretender.id, "sleep 1000")), "the step")
    pretender.cluster.run("scancel", pretender.id)
    assert pretender.finish() == "CANCELLED"
    time.sleep(1)
    assert pretender.cluster.job(pretender.id)["Restarts"] == "0"


def test_killed_launcher_is_a_crash_even_if_the_rest_stopped_well(pretender: Job) -> None:
    outcome = 'for w in "$@"; do case $w in --logs=*) echo "75 stopped" > ${w#*=}/outcome.$SLURMD_NODENAME; esac; done'
    pretender.submit(RLVR_MAX_TRIES="1", PRETEND=f'[ "$SLURM_PROCID" = 1 ] && kill -9 $$; {outcome}; exit 75')
    assert pretender.finish() == "FAILED"
    assert "failed: the launcher of a node was killed" in pretender.history()
