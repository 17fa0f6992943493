"""The quickstart as a job of two nodes, from its example script, under every kind of interruption."""

from __future__ import annotations

import random
import re
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_rlvr.telemetry.status import read_status
from tests.integration.slurm.cluster import Cluster
from tests.integration.slurm.jobs import Job, wait_until, with_stand_in_servers
from tests.processes import ROOT

STEPS = 16
SCRIPT = ROOT / "examples" / "slurm" / "quickstart-cpu.sbatch"


@pytest.fixture(scope="module")
def uninterrupted(cluster: Cluster, settings, tmp_path_factory: pytest.TempPathFactory) -> Job:  # type: ignore[no-untyped-def]
    """A finished job to compare with, and to evaluate."""
    with pytest.MonkeyPatch.context() as patch:
        from tests.integration.slurm.conftest import set_job_environment

        set_job_environment(patch)
        job = Job(cluster, SCRIPT, tmp_path_factory.mktemp("uninterrupted") / "run", settings.overrides())
        began = time.monotonic()
        job.submit(f"steps={STEPS}")
        job.wait_for_steps(1)
        first = time.monotonic() - began
        assert job.finish() == "COMPLETED"
    preflight = float(re.search(r"preflight: all nodes passed \((.*) s\)", cluster.output(job.id))[1])  # type: ignore[index]
    print(f"\nfrom sbatch to the first step {first:.1f} s, of which preflight {preflight:.1f} s")
    return job


def test_it_runs_and_reports_its_status(uninterrupted: Job, job_environment: None) -> None:
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
    quickstart.cluster.restore()
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
        *with_stand_in_servers(replace(uninterrupted, overrides=[])).overrides,
        problems.replace("data.train", "data.heldout"),
        "evaluation.prompts=8",
        "evaluation.samples=2",
    ]
    variables = {"RLVR_PROCESSES_PER_NODE": "2"}  # its nodes have GPUs in name only
    job.id = job.cluster.submit(job.script, *arguments, f"run_directory={tmp_path / 'job'}", **variables)
    assert job.finish() == "COMPLETED", job.cluster.output(job.id)
    assert re.search(r"SGLang servers: http://127\.0\.0\.1:\d+\n", job.cluster.output(job.id))
    assert '"step": 16' in (uninterrupted.run / "evaluation_step_16.json").read_text()
    assert not job.cluster.orphans(job.id)


# Tests without training: a shell script takes the place of Python -----------------------------------------------------

FAKE_PYTHON = """#!/bin/bash
# The preflight succeeds, or runs $PREFLIGHT. Everything else runs $PROGRAM, a launcher with $logs set.
logs=''
for word in "$@"; do
    case $word in --report=*) report=${word#*=} ;; --logs=*) logs=${word#*=} ;; esac
done
case "$*" in
    *cluster.preflight*) mkdir -p "$report" && eval "${PREFLIGHT:-echo 0 fine > \\"\\$report\\"/verdict}" ;;
    *) eval "$PROGRAM" ;;
esac
"""


@pytest.fixture
def fake_job(cluster: Cluster, tmp_path: Path, job_environment: None, monkeypatch: pytest.MonkeyPatch) -> Job:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text(FAKE_PYTHON)
    (tmp_path / "bin" / "python").chmod(0o755)
    monkeypatch.setenv("RLVR_ENVIRONMENT", f"venv:{tmp_path}")
    return Job(cluster, SCRIPT, tmp_path / "run", ["model.path=none"])


# Write the outcome of a launcher. Wait for the outcomes of several nodes: the first launcher to end may end the others.
OUTCOME = '[ -z "$logs" ] || echo "$outcome" > "$logs"/outcome.$SLURMD_NODENAME'
AWAIT_OUTCOMES = 'until [ "$(cat "$logs"/outcome.* | wc -l)" -ge %d ]; do sleep 0.1; done'


def test_crash_loop_ends_with_the_reason(fake_job: Job) -> None:
    reason = "rank 3 on n2 ended of SIGSEGV: its last words"
    peer = "rank 0 on n1 ended with status 1: lost its peer"
    outcome = f'outcome="139 {reason}"; [ "$SLURM_PROCID" = 1 ] || outcome="1 {peer}"'
    fake_job.submit(RLVR_MAX_TRIES="2", PROGRAM=f"{outcome}; {OUTCOME}; {AWAIT_OUTCOMES % 2}; exit ${{outcome%% *}}")
    assert fake_job.finish() == "FAILED"
    history = fake_job.history()
    assert len(re.findall(rf"attempt \d: failed: {reason}", history)) == 2
    assert history.rstrip().endswith(
        f"gave up: 2 attempts from the beginning ended without a new checkpoint, the last because of: {reason}"
    )


def test_cancelled_job_stays_cancelled(fake_job: Job) -> None:
    fake_job.submit(PROGRAM="sleep 1000")
    fake_job.cluster.wait_for_output(fake_job.id, "try 1 from")
    # Slurm here finds a step's processes through their parents. It would miss one whose parent it kills during a fork.
    wait_until(lambda: len(fake_job.cluster.processes(fake_job.id, "^sleep 1000")) == 2, "the step on both nodes")
    fake_job.cluster.run("scancel", fake_job.id)
    assert fake_job.finish() == "CANCELLED"  # none of its processes is left, which could ask for another attempt
    assert fake_job.cluster.job(fake_job.id)["Restarts"] == "0"


def test_a_killed_launcher_is_a_crash_even_if_the_others_stopped(fake_job: Job) -> None:
    killed = f'[ "$SLURM_PROCID" = 1 ] && {{ {AWAIT_OUTCOMES % 1}; kill -9 $$; }}'
    fake_job.submit(RLVR_MAX_TRIES="1", PROGRAM=f'{killed}; outcome="75 stopped"; {OUTCOME}; exit 75')
    assert fake_job.finish() == "FAILED"
    assert "failed: the launcher of a node was killed" in fake_job.history()


def test_a_job_does_not_depend_on_the_job_that_it_is_submitted_from(fake_job: Job) -> None:
    outer = {
        "SLURM_ARRAY_JOB_ID": "1",
        "SLURM_ARRAY_TASK_ID": "0",
        "SLURM_RESTART_COUNT": "3",
        "SLURM_CPUS_PER_TASK": "1",
        "SLURM_MEM_PER_CPU": "11",
        "SLURM_MEM_PER_NODE": "11",
        "SLURM_CPU_BIND": "quiet,mask_cpu:0x1",
        "SLURM_GPUS_ON_NODE": "8",
        "SLURM_EXPORT_ENV": "NONE",
    }
    # Into a file, because srun may lose what a task prints before another one of its step fails.
    step = '"cores $SLURM_CPUS_PER_TASK, bind ${SLURM_CPU_BIND:-not}, processes $*"'
    report = f'[ -z "$logs" ] || echo {step} > "$logs"/step.$SLURMD_NODENAME'
    outcome = 'outcome="0 "; [ ${SLURM_RESTART_COUNT:-0} = 1 ] || outcome="1 broken"'
    fake_job.submit(PROGRAM=f"{report}; {outcome}; {OUTCOME}; {AWAIT_OUTCOMES % 2}; exit ${{outcome%% *}}", **outer)
    assert fake_job.finish() == "COMPLETED", fake_job.cluster.output(fake_job.id)
    attempts = re.findall(r"attempt (\d): try \d", fake_job.history())
    assert attempts == ["0", "1"]
    steps = [file.read_text() for file in (fake_job.run / "slurm").glob("*/step.*")]
    found = re.findall(r"cores (\d+), bind (\S+), processes .*--nproc-per-node=(\d+)", "".join(steps))
    assert found == [("4", "not", "1")] * 4


def test_an_element_of_an_array_is_requeued_alone(fake_job: Job) -> None:
    outcome = 'outcome="0 "; [ $SLURM_ARRAY_TASK_ID.${SLURM_RESTART_COUNT:-0} != 1.0 ] || outcome="1 broken"'
    array = fake_job.cluster.submit(
        fake_job.script,
        "model.path=none",
        f"run_directory={fake_job.run}",
        options=["--array=0-1%1"],
        PROGRAM=f"{outcome}; {OUTCOME}; exit ${{outcome%% *}}",
    )
    wait_until(lambda: fake_job.history().count(": done") == 2, "both elements")
    states = [fake_job.cluster.job(f"{array}_{element}") for element in (0, 1)]
    assert [state["Restarts"] for state in states] == ["0", "1"]


def test_a_node_that_hangs_in_the_preflight_is_left_out(fake_job: Job) -> None:
    hang = "trap '' TERM; sleep 1000"
    verdict = "echo n2 > $report/bad_nodes; echo '69 n2: no report' > $report/verdict; exit 69"
    fake_job.submit(
        options=["--nodelist=n1,n2"],
        PREFLIGHT=f'[ "$SLURM_PROCID" = 0 ] || {{ {hang}; }}; {verdict}',
        PROGRAM="exit 1",
    )
    fake_job.cluster.wait_for_output(fake_job.id, "the next attempt leaves out n2")
    fake_job.cluster.run("scancel", fake_job.id)
    fake_job.finish()
    assert "attempt 0: preflight: n2: no report" in fake_job.history()


def test_modules_are_found_and_may_fail_within(fake_job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lmod" / "init").mkdir(parents=True)
    (tmp_path / "bin" / "python").rename(tmp_path / "bin" / "python3")
    module = f'module() {{ echo "$1 ${{@:2}} $NOT_SET"; false; PATH={tmp_path}/bin:$PATH; }}; false\n'
    (tmp_path / "lmod" / "init" / "bash").write_text(module)
    monkeypatch.setenv("RLVR_ENVIRONMENT", "module:python/3.11,cuda")
    fake_job.submit(LMOD_PKG=str(tmp_path / "lmod"), PROGRAM=f'outcome="0 "; {OUTCOME}')
    assert fake_job.finish() == "COMPLETED", fake_job.cluster.output(fake_job.id)
    assert "load python/3.11 cuda" in fake_job.cluster.output(fake_job.id)
    fake_job.submit(LMOD_PKG="/nowhere", PATH="/usr/sbin:/usr/bin:/bin")
    assert fake_job.finish() == "FAILED"
    assert "error: `module load python/3.11 cuda` on " in fake_job.cluster.output(fake_job.id)


def test_the_first_job_makes_its_data(fake_job: Job, tmp_path: Path) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    fake_job.overrides = []
    report = 'case "$*" in *quickstart/*.py) echo "made by $* of ${PYTHONPATH%%:*}" ;; esac'
    fake_job.submit(RLVR_PROJECT=str(tmp_path), PROGRAM=f'{report}; outcome="0 "; {OUTCOME}')
    assert fake_job.finish() == "COMPLETED", fake_job.cluster.output(fake_job.id)
    made = re.findall(r"made by (\S+) .*of (\S+)", fake_job.cluster.output(fake_job.id))
    assert made == [("examples/quickstart/countdown.py", str(tmp_path))]  # with the code of the project
    fake_job.submit("run_directory=" + str(tmp_path / "other"), RLVR_PROJECT=str(tmp_path), PROGRAM="exit 3")
    fake_job.cluster.wait_for_output(fake_job.id, r"failed: examples/quickstart/countdown\.py failed")
    fake_job.cluster.run("scancel", fake_job.id)
    fake_job.finish()


def test_a_time_limit_that_leaves_no_time_does_not_loop_forever(fake_job: Job) -> None:
    # One node ends. The other signals the batch script and ends when this attempt has noticed that it was signalled.
    output = fake_job.cluster.root / "out-$SLURM_JOB_ID.txt"
    noticed = f'[ "$(grep -c "asked to stop (USR1)" {output})" -gt "${{SLURM_RESTART_COUNT:-0}}" ]'
    asked = f"{AWAIT_OUTCOMES % 1}; scancel --batch --signal=USR1 $SLURM_JOB_ID; until {noticed}; do sleep 0.1; done"
    fake_job.submit(
        RLVR_MAX_TRIES="2",
        PROGRAM=f'trap "" USR1; [ "$SLURM_PROCID" = 1 ] || {{ {asked}; }}; outcome="75 stopped"; {OUTCOME}',
    )
    assert fake_job.finish() == "FAILED"
    reason = "asked before a step was finished: the time limit must be longer than the seconds of --signal"
    assert f"attempt 1: stopped (USR1: {reason})" in fake_job.history()
    assert fake_job.history().rstrip().endswith(f"ended without a new checkpoint, the last because of: {reason}")


# What a name can do to a script that splits, expands, evaluates or prints it.
_FRAGMENTS = [
    *("it's", '"', " ", "  ", "$(touch CREATED)", "`touch CREATED`", "a[$(touch CREATED)]", "*", "?", "[a]", "{a,b}"),
    *("%j", "%N", "\\", "\\n", ";", "&", "|", ">", "#", "!", "~", ":", ",", "=", "0123", "-rf", "--", "Restarts=7"),
    *("über", "漢"),
]


@pytest.mark.parametrize("seed", range(3))
def test_a_hostile_run_directory_is_only_a_name(fake_job: Job, tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    name = "".join(rng.sample(_FRAGMENTS, 12)).replace("${", "$")
    fake_job.run = tmp_path / ("-" * (seed == 1) + name)
    # A name with words like those of scontrol, in the place where scontrol prints it.
    options = [f"--job-name={name} Restarts=7 Requeue=0 ExitCode=0:0\n   Requeue=0 Restarts=7 BatchFlag=1"]
    # The batch script of the first attempt is killed, so the guard acts; the second attempt fails, the third ends.
    outcome = 'outcome="0 "; [ "${SLURM_RESTART_COUNT:-0}" != 1 ] || outcome="1 -n broken"'
    killed = '[ -n "${SLURM_RESTART_COUNT:-}" ] || { touch "$logs/started.$SLURM_PROCID"; sleep 1000; }'
    fake_job.submit(
        options=options, PROGRAM=f"{killed}; {outcome}; {OUTCOME}; {AWAIT_OUTCOMES % 2}; exit ${{outcome%% *}}"
    )
    wait_until(lambda: len(list((fake_job.run / "slurm").glob("*.0/started.*"))) == 2, "the first attempt")
    fake_job.kill_batch_script()
    assert fake_job.finish() == "COMPLETED", fake_job.cluster.output(fake_job.id)
    history = fake_job.history()
    assert re.findall(r"attempt (\d): try", history) == ["0", "1", "2"], history
    assert "attempt 1: failed: -n broken" in history
    assert not list(tmp_path.rglob("CREATED")) and not (ROOT / "CREATED").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a\nb", "holds a control character"),
        ("ends\n", "holds a control character"),
        ("a\x1b[31m", "holds a control character"),
        ("a${name}", "begins a reference"),
        ("'quoted'", "begins with a quotation mark"),
        ("", "run_directory has no value"),
        ("null", "run_directory has no value"),
    ],
)
def test_a_run_directory_that_the_trainer_would_read_differently_is_refused(
    fake_job: Job, name: str, message: str
) -> None:
    fake_job.id = fake_job.cluster.submit(SCRIPT, "model.path=none", f"run_directory={name}", PROGRAM="exit 3")
    assert fake_job.finish() == "FAILED"
    assert fake_job.cluster.job(fake_job.id)["ExitCode"] == "2:0"
    output = fake_job.cluster.output(fake_job.id)
    assert output.startswith("error: ") and message in output and output.count("\n") == 1, output
