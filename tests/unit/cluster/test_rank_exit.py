"""Which rank is reported when several end: the one that failed first, whichever the launcher notices first.

Events decide the order in these tests: a rank waits for a file that another one, or its record, leaves.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_rlvr.cluster.outcome import Outcome
from megatron_rlvr.cluster.rank_exit import RankExit, exit_path, failure_path, first_failure, read_exit, write_exit
from megatron_rlvr.errors import UserError
from megatron_rlvr.exit_status import FAILURE_FILE_VARIABLE, failure_recorded
from megatron_rlvr.rollout.engines.base import EngineLostError, RolloutError
from tests.processes import environment

NODE = "localhost"  # torchrun must be able to resolve it
# Functions for every rank: `wait_for` a file in the log folder, `leave` one there.
PRELUDE = """
import os, signal, sys, time
from pathlib import Path
from megatron_rlvr.exit_status import failure_recorded
rank, logs = int(os.environ["RANK"]), Path(sys.argv[1])
def wait_for(name):
    while not (logs / name).exists():
        time.sleep(0.01)
def leave(name):
    (logs / name).touch()
def forever():
    leave(f"ready_{rank}")
    while True:
        time.sleep(1)
def terminated(*_):
    print("ConnectionError: terminated", flush=True)
    sys.exit(1)
"""


def launch(tmp_path: Path, program: str, ranks: int = 3) -> subprocess.Popen[bytes]:
    (tmp_path / "rank.py").write_text(PRELUDE + program)
    logs = tmp_path / "logs"
    options = ["--nnodes=1", f"--nproc-per-node={ranks}", "--rdzv-id=1", "--rdzv-endpoint=localhost:0"]
    options += [f"--logs={logs}", "--", str(tmp_path / "rank.py"), str(logs)]
    command = [sys.executable, "-m", "megatron_rlvr.cluster.torchrun", *options]
    return subprocess.Popen(
        command, env=environment() | {"SLURMD_NODENAME": NODE}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def outcome(tmp_path: Path) -> str:
    """The line of the outcome with the reason."""
    return (tmp_path / "logs" / f"outcome.{NODE}").read_text().splitlines()[0]


CAUSE_IS_RANK_2 = "1 rank 2 on localhost ended with status 1: ValueError: the cause"

SCENARIOS = {
    "ranks that SIGTERM ends": """
if rank < 2:
    forever()
wait_for("ready_0"), wait_for("ready_1")
raise ValueError("the cause")
""",
    "ranks that log an error after SIGTERM": """
if rank < 2:
    signal.signal(signal.SIGTERM, terminated)
    forever()
wait_for("ready_0"), wait_for("ready_1")
raise ValueError("the cause")
""",
    "ranks that lose their peer before torchrun notices": """
with failure_recorded():
    if rank < 2:
        wait_for("rank_2.failure")
        raise ConnectionError("connection closed by peer")
    raise ValueError("the cause")
""",
    "ranks that end sooner than the cause": """
try:
    with failure_recorded():
        if rank < 2:
            wait_for("rank_2.failure")
            raise ConnectionError("connection closed by peer")
        raise ValueError("the cause")
finally:
    if rank == 2:  # it stops its servers, say, until torchrun ends it
        signal.signal(signal.SIGTERM, lambda *_: leave("terminated"))
        wait_for("rank_0.exit"), wait_for("terminated")
""",
}


@pytest.mark.parametrize("program", SCENARIOS.values(), ids=SCENARIOS)
def test_the_first_rank_that_failed_is_reported_over(program: str, tmp_path: Path) -> None:
    assert launch(tmp_path, program).wait() == 1
    assert outcome(tmp_path) == CAUSE_IS_RANK_2


def test_a_rank_that_is_killed_is_reported_over_one_that_loses_it(tmp_path: Path) -> None:
    program = """
with failure_recorded():
    if rank == 2:
        print("torch.cuda is gone", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    wait_for("rank_2.exit")
    raise ConnectionError("connection closed by peer")
"""
    assert launch(tmp_path, program).wait() == 128 + signal.SIGKILL
    assert outcome(tmp_path) == "137 rank 2 on localhost ended of SIGKILL: torch.cuda is gone"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_rank_that_starts_gets_a_signal_from_its_supervisor_alone(number: signal.Signals, tmp_path: Path) -> None:
    """torchrun signals the process group, which the rank leaves soon after it is forked."""
    program = f"""
import os, signal, sys, time
from pathlib import Path
from megatron_rlvr.cluster import rank_supervisor
def signalled(supervisor):
    os.kill(os.getpid(), {number})
    os.kill(supervisor, signal.SIGTERM)
rank_supervisor.bind_to_parent = signalled
sys.exit(rank_supervisor.run_rank(Path(sys.argv[1]), ["-c", "import time; time.sleep(3600)"]))
"""
    done = subprocess.run([sys.executable, "-c", program, tmp_path], env=environment() | {"RANK": "1"})
    assert done.returncode == 128 + signal.SIGTERM
    exit = read_exit(tmp_path, 1, done.returncode, 0.0)
    assert (exit.code, exit.terminated) == (-signal.SIGTERM, True)


def test_a_user_error_is_reported_over_an_earlier_crash(tmp_path: Path) -> None:
    program = """
if rank == 0:
    wait_for("ready_2")
    os._exit(1)
if rank == 1:
    forever()
signal.signal(signal.SIGTERM, lambda *_: leave("terminated"))
leave("ready_2")
wait_for("terminated")
print("error (rank 2): no such file", flush=True)
sys.exit(2)
"""
    assert launch(tmp_path, program).wait() == 2
    assert outcome(tmp_path) == "2 rank 2 on localhost ended with status 2: error (rank 2): no such file"


STOPPING = """
def stop(*_):
    if rank == {crashing}:
        wait_for("rank_0.exit")
        raise ValueError("while saving")
    sys.exit(75)
if rank == {crashing}:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun sends it when rank 0 has exited
signal.signal(signal.SIGUSR1, stop)
if rank != {unprepared}:
    forever()
signal.signal(signal.SIGUSR1, signal.SIG_DFL)  # not yet at the point where it handles signals
forever()
"""


@pytest.mark.parametrize(
    ("crashing", "unprepared", "status", "reason"),
    [
        (None, None, 75, "ended with status 75"),
        (None, 2, 75, ""),
        (1, None, 1, "1 rank 1 on localhost ended with status 1: ValueError: while saving"),
    ],
    ids=["all stop", "one is not ready to", "one crashes while it saves"],
)
def test_stop_signal(crashing: int | None, unprepared: int | None, status: int, reason: str, tmp_path: Path) -> None:
    launcher = launch(tmp_path, STOPPING.format(crashing=crashing, unprepared=unprepared))
    while not all((tmp_path / "logs" / f"ready_{rank}").exists() for rank in range(3)):
        assert launcher.poll() is None
        time.sleep(0.01)
    launcher.send_signal(signal.SIGUSR1)
    assert launcher.wait() == status
    assert outcome(tmp_path).startswith(f"{status} rank ") and reason in outcome(tmp_path)


def test_a_rank_that_stops_is_reported_over_one_that_the_signal_ended_first() -> None:
    exits = [RankExit(0, -signal.SIGTERM, 100.1), RankExit(1, 75, 100.2), RankExit(2, 75, 100.3)]
    assert first_failure(exits, asked=True).rank == 1


def test_a_rank_that_torchrun_had_to_kill_is_not_the_cause(tmp_path: Path) -> None:
    """torchrun kills a rank that hangs in a collective half a minute after its SIGTERM."""
    write_exit(tmp_path, 0, None, None, terminated=100.2)
    write_exit(tmp_path, 3, 1, 100.1, terminated=None)
    exits = [read_exit(tmp_path, 0, -signal.SIGKILL, 130), read_exit(tmp_path, 3, 1, 130)]
    assert exits == [RankExit(0, -signal.SIGKILL, 131.0, terminated=True), RankExit(3, 1, 100.1)]
    assert first_failure(exits, asked=False).rank == 3


@pytest.mark.parametrize("killed_by", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("status", [1, 2, 75])
def test_a_rank_that_torchrun_ends_after_it_failed_has_the_status_of_its_error(
    status: int, killed_by: signal.Signals, tmp_path: Path
) -> None:
    """The rank that lost its peer exits first, and torchrun then ends the one that was the cause."""
    for rank, failed in ((0, 100.2), (1, 100.1)):
        failure_path(tmp_path, rank).write_text(json.dumps({"time": failed, "status": status if rank else 1}))
    write_exit(tmp_path, 0, 1, 100.3, terminated=None)
    write_exit(tmp_path, 1, -killed_by, 100.5, terminated=100.4)
    exits = [read_exit(tmp_path, rank, 128 + killed_by, 100) for rank in range(2)]
    assert exits == [RankExit(0, 1, 100.2), RankExit(1, status, 100.1)]
    assert first_failure(exits, asked=False).rank == (0 if status == 75 else 1)


def test_a_rank_that_was_terminated_while_it_started_is_not_the_cause(tmp_path: Path) -> None:
    """Its supervisor left no record, and torchrun gives the time in whole seconds, rounded down."""
    write_exit(tmp_path, 2, -signal.SIGKILL, 100.6, terminated=None)
    exits = [read_exit(tmp_path, 0, -signal.SIGTERM, 100), read_exit(tmp_path, 2, 128 + signal.SIGKILL, 100)]
    assert exits == [RankExit(0, -signal.SIGTERM, 101.0, terminated=True), RankExit(2, -signal.SIGKILL, 100.6)]
    assert first_failure(exits, asked=False).rank == 2


def test_a_rank_whose_supervisor_was_killed_in_the_second_of_the_cause_is_not_the_cause(tmp_path: Path) -> None:
    write_exit(tmp_path, 1, -signal.SIGSEGV, 100.6, terminated=None)
    exits = [read_exit(tmp_path, 0, -signal.SIGKILL, 100), read_exit(tmp_path, 1, 128 + signal.SIGSEGV, 100)]
    assert first_failure(exits, asked=False).rank == 1


def test_a_rank_that_reports_lost_servers_comes_before_those_that_wait_for_it() -> None:
    lost = RankExit(4, 75, 10.0)
    assert first_failure([RankExit(0, 1, 11.0, terminated=True), lost], asked=False) == lost


def test_an_outcome_says_when_the_first_rank_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURMD_NODENAME", "n1")
    Outcome(1, "rank 2 failed", 1700000000.25).write(tmp_path)
    assert (tmp_path / "outcome.n1").read_text() == "1 rank 2 failed\nat 1700000000.250000\n"
    Outcome(75, "stopped").write(tmp_path)
    assert (tmp_path / "outcome.n1").read_text() == "75 stopped\n"


@pytest.mark.parametrize(
    ("error", "status"), [(UserError("a"), 2), (RolloutError("a"), 2), (EngineLostError("a"), 75), (ValueError("a"), 1)]
)
def test_the_record_of_a_failure_has_the_status_that_the_program_exits_with(
    error: Exception, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FAILURE_FILE_VARIABLE, str(failure_path(tmp_path, 0)))
    with pytest.raises(type(error)), failure_recorded():
        raise error
    write_exit(tmp_path, 0, -signal.SIGTERM, time.time(), terminated=time.time())
    assert read_exit(tmp_path, 0, 128 + signal.SIGTERM, 0).code == status


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"code": "x", "exited": 1, "terminated": null}', b"[" * 10_000])
def test_a_damaged_record_counts_as_none(damage: bytes, tmp_path: Path) -> None:
    """After a power cut, the exit status that torchrun saw still says how a rank ended."""
    exit_path(tmp_path, 0).write_bytes(damage)
    failure_path(tmp_path, 0).write_bytes(damage)
    assert read_exit(tmp_path, 0, code=2, noticed=5.0) == RankExit(0, 2, 6.0, False)
