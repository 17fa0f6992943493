"""Nothing but the value that `main` returns becomes exit status 0."""

from __future__ import annotations

import subprocess
import sys

import pytest

from megatron_rlvr.errors import UserError
from megatron_rlvr.train import main

PROGRAM = """
import argparse, atexit, os, signal, sys, threading
from megatron_rlvr.exit_status import user_errors_reported

@user_errors_reported
def main():
    {body}

sys.exit(main())
"""


def test_a_user_error_is_one_line_that_changes_no_terminal() -> None:
    assert str(UserError("line 1\nline 2\x1b[2J\r\u2028 \ud800 é")) == "line 1 line 2 [2J     é"


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        ("return 0", 0, ""),
        ("return 75", 75, ""),
        ("sys.exit(0)", 1, "error: something raised SystemExit(0)"),
        ("sys.exit()", 1, "error: something raised SystemExit(None)"),
        ("os._exit(0)", 1, "error: something called os._exit(0)"),
        ("os._exit(3)", 3, ""),
        ("atexit.register(os._exit, 0); return 2", 1, "error: something called os._exit(0)"),
        ("atexit.register(os._exit, 0); return 0", 0, ""),
        ("threading.Thread(target=os._exit, args=(0,)).start(); signal.pause()", 1, "os._exit(0)"),
        ("signal.signal(14, lambda *_: sys.exit(0)); signal.alarm(1); signal.pause()", 1, "SystemExit(0)"),
        ("os.fork() or os._exit(0); return os.waitstatus_to_exitcode(os.wait()[1]) + 7", 7, ""),
        ("argparse.ArgumentParser().parse_args(['--help'])", 0, ""),
        ("argparse.ArgumentParser().parse_args(['--nothing'])", 2, "unrecognized arguments"),
        ("raise KeyboardInterrupt", -2, "KeyboardInterrupt"),
    ],
)
def test_status_of_a_program(body, status, says):
    program = [sys.executable, "-c", PROGRAM.format(body=body)]
    ended = subprocess.run(program, capture_output=True, text=True, check=False)
    assert ended.returncode == status, ended.stderr
    assert says in ended.stderr


def test_a_broken_verifier_ends_a_run_with_its_traceback_and_one_line(run_yaml, tmp_path, monkeypatch, capfd):
    (tmp_path / "broken_rewards.py").write_text("def score(completion, answer):\n    return 1 / 0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert main([str(run_yaml), "verifier.name=broken_rewards:score", "verifier.workers=1"]) == 2
    lines = capfd.readouterr().err.splitlines()
    assert lines[-1].startswith("error: verifier broken_rewards:score failed for all ")
    assert "ZeroDivisionError: division by zero" in lines[-1]
    assert any(line.startswith("Traceback") for line in lines)


def test_a_function_that_exits_does_not_end_a_run_as_done(run_yaml, tmp_path, monkeypatch, capfd):
    (tmp_path / "exits_here.py").write_text("import sys\ndef score(completion, answer):\n    sys.exit(0)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert main([str(run_yaml), "verifier.name=exits_here:score", "verifier.workers=0"]) == 2
    assert "failed for all" in capfd.readouterr().err
