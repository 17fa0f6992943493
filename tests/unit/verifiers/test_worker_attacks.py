"""Verifiers that attack the pool: each costs its worker, none costs the trainer or another completion its reward."""

import os
import random
import signal
import struct
import time
from pathlib import Path

import pytest
import verifiers_that_misbehave as misbehaving

from megatron_rlvr.errors import UserError
from megatron_rlvr.verifiers import Verdict, VerifierPool, build_pool
from megatron_rlvr.verifiers.channel import LONGEST_REPLY, FrameReader, ProtocolError, Reply, decoded, frame
from megatron_rlvr.verifiers.config import VerifierConfig
from megatron_rlvr.verifiers.descendants import MARK_VARIABLE
from megatron_rlvr.verifiers.source import VerifierSource
from megatron_rlvr.verifiers.verdict import STATUSES

ATTACKS = {
    "garbage": "crash",
    "oversized frame": "crash",
    "pickled command": "crash",
    "pickled tuple": "crash",
    "forged reply": "crash",
    "close the channel": "crash",
    "interrupt": "crash",
    "fork": "ok",
    "fork and reply": "ok",
    "close standard streams": "ok",
    "exit": "error",
    "end by the timer": "timeout",
}


def test_attacks_cost_their_own_completion_alone(tmp_path):
    items = [item for attack in ATTACKS for item in ("good", attack)] + ["good"] * 3
    with VerifierPool(misbehaving.attack, workers=2) as pool:
        verdicts = pool.verify(items, [str(tmp_path / "created")] * len(items))
        statuses = [ATTACKS.get(item, "ok") for item in items]
        assert [verdict.status for verdict in verdicts] == statuses
        assert [verdict.reward for verdict in verdicts] == [float(status == "ok") for status in statuses]
        assert pool.verify(["good"] * 8, [0] * 8) == [Verdict(1.0, "ok")] * 8
    assert not (tmp_path / "created").exists()


@pytest.mark.parametrize("message", ["later garbage", "later refusal"])
def test_messages_between_batches_cost_nothing(message):
    with VerifierPool(misbehaving.attack, workers=1) as pool:
        assert pool.verify([message], [0]) == [Verdict(1.0, "ok")]
        worker = pool._workers[0]
        while not worker._readable():
            time.sleep(0.01)
        assert pool.verify(["good"] * 3, [0] * 3) == [Verdict(1.0, "ok")] * 3
        assert pool._workers[0] is not worker


@pytest.mark.parametrize("length", [1, 3_000_000])  # the longer message does not fit into the socket
def test_a_worker_stopped_between_batches_is_replaced(length):
    with VerifierPool(misbehaving.process_id, workers=1, timeout_s=2.0) as pool:
        first = int(pool.verify(["a"], ["a"])[0].reward)
        os.kill(first, signal.SIGSTOP)
        started = time.monotonic()
        verdicts = pool.verify(["a" * length] * 3, [0] * 3)
        assert [verdict.status for verdict in verdicts] == ["ok"] * 3
        assert verdicts[0].reward != first
        assert time.monotonic() - started >= 2.0


def test_an_item_that_stops_its_worker_is_tried_twice():
    with VerifierPool(misbehaving.attack, workers=1, timeout_s=1.0) as pool:
        verdicts = pool.verify(["stop", "good"], [0, 0])
    assert [verdict.status for verdict in verdicts] == ["timeout", "ok"]


def test_processes_that_left_the_group_end_with_the_pool():
    with VerifierPool(misbehaving.attack, workers=1, timeout_s=60) as pool:
        nap = f"5800.{os.getpid()}"
        assert pool.verify(["leave the group"], [nap])[0].status == "ok"
        marks = {pool._workers[0]._mark}
        while len(_marked(marks)) != 2:  # the worker and its child, which shows no environment while it starts sleep
            time.sleep(0.05)
        assert pool.verify(["leave the group and die"], [nap])[0].status == "crash"
        marks.add(pool._workers[0]._mark)
    assert len(marks) == 2
    while _marked(marks):  # never ends if one survived
        time.sleep(0.05)


def _marked(marks: set[str]) -> list[int]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environment = (folder / "environ").read_bytes()
        except OSError:
            continue
        if any(f"{MARK_VARIABLE}={mark}".encode() in environment for mark in marks):
            found.append(int(folder.name))
    return found


@pytest.mark.parametrize("workers", [0, 1])
def test_what_a_verifier_may_return(workers):
    with VerifierPool(misbehaving.score_in_a_dictionary, workers=workers) as pool:
        assert pool.verify(["abc"], [0]) == [Verdict(0.25, "ok")]
        assert pool.first_failure is None
    with VerifierPool(misbehaving.score_with_an_answer, workers=workers) as pool:
        # The answer is kept beside the reward, up to a length, and is no failure.
        assert pool.verify(["Bear", "x" * 5000], [0] * 2) == [
            Verdict(1.0, "ok", "bear"),
            Verdict(1.0, "ok", "x" * 1000),
        ]
        assert pool.first_failure is None
    with VerifierPool(misbehaving.score_of_another_kind, workers=workers) as pool:
        assert pool.verify(["none", "dictionary", "large", "text", "truth"], [0] * 5) == [
            Verdict(0.0, "error", "the verifier returned None, which is not a number"),
            Verdict(0.0, "error", "the verifier returned a dictionary with 'accuracy', which is not a number"),
            Verdict(0.0, "error", "the verifier returned 1e+39, infinite as a float32"),
            Verdict(0.5, "ok"),
            Verdict(1.0, "ok"),
        ]
    with VerifierPool(misbehaving.score, workers=workers) as pool:
        pool.verify(["raise"], [0])
        assert "in score\n" in pool.first_failure.traceback
        assert pool.first_failure.traceback.rstrip().endswith("KeyError: 'no such thing'")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_function_that_exits_is_an_error_of_its_completion(workers):
    with VerifierPool(misbehaving.attack if workers else _exit, workers=workers) as pool:
        assert pool.verify(["exit"], [0]) == [Verdict(0.0, "error", "SystemExit: 0")]


def _exit(completion, answer):
    raise SystemExit(0)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        ("import sys; sys.exit(0)", "a worker process cannot load the verifier: SystemExit: 0"),
        (
            "import os; os._exit(0)",
            "exits_{}:score cannot be loaded: 3 worker processes failed.*exit status 0",
        ),
        ("1 / 0", "ZeroDivisionError"),
        ("def scores(completion, answer): return 1", "has no function score; it has scores"),
    ],
)
def test_a_module_is_imported_in_workers_only(module, message, tmp_path, monkeypatch):
    name = f"exits_{abs(hash(module))}"
    (tmp_path / f"{name}.py").write_text(module)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match=message.format(name.removeprefix("exits_"))):
        build_pool(VerifierConfig(f"{name}:score", workers=1))


# Mutations of replies, over real sockets and with a worker that is no process.


class _NoProcess:
    """Takes the place of the worker's process: answers requests with replies of which some are mutated."""

    pid, returncode = 2**31 - 1, 0

    def __init__(self, arguments, pass_fds, **_):
        self.channel = os.dup(pass_fds[0])

    def poll(self):
        return None

    def wait(self, timeout=None):
        return 0


def _mutated(payload: bytes, draw: random.Random) -> list[bytes]:
    """Return the bytes that a misbehaving worker sends instead of one reply."""
    whole = frame(payload)
    position = draw.randrange(len(whole))
    reply = decoded(payload)
    kinds = ["flip", "cut", "insert", "twice", "garbage", "long", "index", "reward", "kind", "empty", "text", "nothing"]
    match draw.choice(kinds):
        case "flip":
            return [whole[:position], bytes([whole[position] ^ (1 << draw.randrange(8))]), whole[position + 1 :]]
        case "cut":
            return [whole[:position]]
        case "insert":
            return [whole[:position], draw.randbytes(draw.randrange(1, 40)), whole[position:]]
        case "twice":
            return [whole, whole]
        case "garbage":
            return [draw.randbytes(draw.randrange(1, 4000))]
        case "long":
            return [struct.pack("!Q", draw.choice([LONGEST_REPLY + 1, 1 << 40, (1 << 64) - 1])), draw.randbytes(100)]
        case "index":
            index = max(0, reply.index + draw.choice([-1, 1, 1000, 1 << 60]))
            return [frame(Reply(reply.kind, index, reply.reward).encoded())]
        case "reward":
            reward = draw.choice([float("nan"), float("inf"), -float("inf"), 1e39, -1e300, -0.0])
            return [frame(Reply(reply.kind, reply.index, reward).encoded())]
        case "kind":
            kind = draw.choice(["ready", "accepted", "error", "memory"])
            return [frame(Reply(kind, reply.index, reply.reward).encoded())]
        case "empty":
            return [frame(b"")]
        case "text":
            return [frame(payload + draw.randbytes(200))]
        case _:
            return []


def test_500_mutated_replies(monkeypatch):
    """The pool gives every item a verdict or refuses with a UserError, and serves the next batch."""
    handled = 0
    for seed in range(500):
        draw = random.Random(seed)
        handled += _serve_mutated(draw, monkeypatch)
    assert handled == 500


def _serve_mutated(draw: random.Random, monkeypatch) -> int:
    from megatron_rlvr.verifiers import worker_process

    mutate_at = draw.randrange(6)  # counted over the replies: ready, accepted, and four verdicts
    sent = 0

    class Worker(worker_process.WorkerProcess):
        """Its process answers whenever the pool looks."""

        def __init__(self, setup, timeout_s):
            super().__init__(setup, timeout_s)
            self.requests = FrameReader(_socket_of(self.process.channel))
            self.requests.connection.setblocking(False)
            self.answer(Reply("ready"))

        def answer(self, reply):
            nonlocal sent
            payload = reply.encoded()
            for part in _mutated(payload, draw) if sent == mutate_at else [frame(payload)]:
                self.requests.connection.sendall(part)
            sent += 1

        def send(self, indices, items):
            super().send(indices, items)
            self.answer(Reply("accepted", indices[0]))
            for index in indices:
                self.answer(Reply("ok", index, 1.0))

    monkeypatch.setattr(worker_process.subprocess, "Popen", _NoProcess)
    monkeypatch.setattr(worker_process, "_START_TIMEOUT_S", 0.02)
    monkeypatch.setattr("megatron_rlvr.verifiers.worker_group.WorkerProcess", Worker)
    monkeypatch.setattr(worker_process, "kill_descendants", lambda *_, **__: None)
    with VerifierPool(VerifierSource("exact"), workers=1, timeout_s=0.02) as pool:
        try:
            verdicts = pool.verify(["a"] * 4, ["a"] * 4)
        except UserError as error:
            assert "\n" not in str(error)
            return 1
        assert len(verdicts) == 4
        for verdict in verdicts:
            assert verdict.status in STATUSES
            assert abs(verdict.reward) <= 3.5e38 and (verdict.status == "ok" or verdict.reward == 0)
        assert sum(verdict.status != "ok" for verdict in verdicts) <= 1
        assert pool.verify(["a"], ["a"]) == [Verdict(1.0, "ok")]
    return 1


def _socket_of(descriptor: int):
    import socket

    return socket.socket(fileno=descriptor)


def test_a_reply_is_read_back_and_everything_else_refused():
    for reply in (
        Reply("ready"),
        Reply("ok", 7, -0.5),
        Reply("error", 1, 0.0, "détail", "trace\n"),
        Reply("refused", 0),
    ):
        assert decoded(reply.encoded()) == reply
    long = decoded(Reply("error", 1, 0.0, "d" * 10**6, "first" + "t" * 10**6 + "last").encoded())
    assert len(long.encoded()) <= LONGEST_REPLY and long.traceback.endswith("last")
    for payload in (b"", b"RLVR", b"x" * 100, Reply("ok").encoded()[:-1], b"X" + Reply("ok").encoded()[1:]):
        with pytest.raises(ProtocolError):
            decoded(payload)
