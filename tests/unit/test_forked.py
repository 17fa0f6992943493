"""The processes of `tests.forked`: they find each other, and the first failure ends all of them."""

import signal
import time

import pytest

from tests.forked import run_forked
from tests.processes import DEADLINE_SECONDS, environment

JOB = """
import sys
import torch
import torch.distributed as dist
from tests.rendezvous import renew

renew(0)
dist.init_process_group("gloo")
total = torch.tensor([dist.get_rank() + 1])
dist.all_reduce(total)
sys.stdout.write(f"sum {total.item()} {sys.argv[1:]}\\n")
"""
FAILURES = {
    "raise ValueError('of rank 1')": 1,
    "sys.exit(7)": 7,
    "os.kill(os.getpid(), signal.SIGKILL)": -signal.SIGKILL,
}


def run(tmp_path, program, processes, *arguments, deadline=DEADLINE_SECONDS):
    (tmp_path / "program.py").write_text(program)
    command = [str(tmp_path / "program.py"), *arguments]
    return run_forked(command, processes, environment(), tmp_path, deadline)


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_form_a_group(tmp_path, processes):
    done = run(tmp_path, JOB, processes, "argument")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"sum {processes * (processes + 1) // 2} ['argument']") == processes


@pytest.mark.parametrize("failure", FAILURES)
def test_the_first_failure_ends_all(tmp_path, failure):
    program = f"import os, signal, sys, time\nif os.environ['RANK'] == '1':\n    {failure}\ntime.sleep(3600)"
    done = run(tmp_path, program, 3)
    assert done.returncode == FAILURES[failure]
    assert ("ValueError: of rank 1" in done.stderr) == (failure.startswith("raise"))


def test_a_single_process_has_no_job_and_the_folder_that_was_asked_for(tmp_path):
    program = "import os\nprint('RANK' in os.environ, os.getcwd(), os.environ['OMP_NUM_THREADS'], __name__)"
    assert run(tmp_path, program, 1).stdout.split() == ["False", str(tmp_path), "1", "__main__"]


def test_a_deadline_ends_all(tmp_path):
    with pytest.raises(TimeoutError, match=r"2 of 2 processes had not ended after 0\.5 s"):
        run(tmp_path, "import time\ntime.sleep(3600)", 2, deadline=0.5)


def test_after_the_deadline_one_reads_what_the_processes_wrote(tmp_path, monkeypatch):
    def late(ranks, _seconds):
        while not (tmp_path / "written").exists():  # however long it takes
            assert ranks[0].is_alive()
            time.sleep(0.05)
        raise TimeoutError("late")

    monkeypatch.setattr("tests.forked._status", late)
    program = "import time\nprint('waits for', 'Godot', flush=True)\nopen('written', 'w').close()\ntime.sleep(3600)"
    with pytest.raises(TimeoutError, match="late:\nwaits for Godot"):
        run(tmp_path, program, 1)
