"""Processes that end with the process that started them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_rlvr.bound_to_parent import bound_command
from tests.processes import environment

# Only the child has the writing end of the pipe, so the pipe closes when the child ends, whichever parent it has then.
PARENT = """
import os, subprocess, sys, time
{bind}
child = subprocess.Popen({command}, stdout=int(sys.argv[1]))
os.close(int(sys.argv[1]))
child.wait()
"""
BOUND = "bound_command([sys.executable, '-c', 'import time; print(1, flush=True); time.sleep(1000)'], os.getpid())"
WATCHING = (
    "[sys.executable, '-c', 'import time; from megatron_rlvr.bound_to_parent import exit_with_parent; "
    "exit_with_parent(); print(1, flush=True); time.sleep(1000)']"
)


@pytest.mark.parametrize("command", [BOUND, WATCHING], ids=["bound_command", "exit_with_parent"])
def test_a_process_ends_with_a_killed_parent(command: str) -> None:
    reader, writer = os.pipe()
    program = PARENT.format(bind="from megatron_rlvr.bound_to_parent import bound_command", command=command)
    parent = subprocess.Popen([sys.executable, "-c", program, str(writer)], pass_fds=[writer], env=environment())
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        assert pipe.readline() == b"1\n"
        parent.kill()
        assert pipe.read() == b""  # returns when the child is gone
    parent.wait()


def test_a_parent_that_died_before_the_request_is_noticed(tmp_path: Path) -> None:
    command = bound_command([sys.executable, "-c", f"open({str(tmp_path / 'ran')!r}, 'w')"], parent=1)
    assert subprocess.run(command).returncode == 1
    assert not (tmp_path / "ran").exists()


def test_the_file_runs_without_this_package(tmp_path: Path) -> None:
    done = subprocess.run(bound_command(["/bin/echo", "yes"], os.getpid()), cwd=tmp_path, env={}, capture_output=True)
    assert (done.returncode, done.stdout) == (0, b"yes\n")
