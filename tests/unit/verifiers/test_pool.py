import contextlib
import logging
import os
import random
import signal
import subprocess
import sys
import time
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import verifiers_that_misbehave as misbehaving

from megatron_rlvr.errors import UserError
from megatron_rlvr.verifiers import Verdict, VerifierPool, build_verifier, worker_process
from megatron_rlvr.verifiers.worker_process import WorkerProcess

MISBEHAVIOUR = {"hang": "timeout", "crash": "crash", "leave": "crash", "hog": "memory", "raise": "error"}
COUNTDOWN_ANSWER = {"numbers": [3, 5, 7, 2], "target": 44}


@pytest.mark.parametrize("seed", [0, 1])
def test_a_failing_item_does_not_affect_the_others(seed):
    items = [*MISBEHAVIOUR, *[f"good {i}" for i in range(40)], *[f"wrong {i}" for i in range(40)]]
    random.Random(seed).shuffle(items)
    answers = [item.replace("wrong", "right") for item in items]
    with VerifierPool(misbehaving.score, workers=2, timeout_s=2.0, memory_mb=256) as pool:
        verdicts = pool.verify(items, answers)
        for item, verdict in zip(items, verdicts, strict=True):
            assert verdict.status == MISBEHAVIOUR.get(item, "ok")
            assert verdict.reward == float(item.startswith("good"))
        assert pool.counts == {"ok": 80, "timeout": 1, "crash": 2, "memory": 1, "error": 1}
        # The pool has recovered.
        assert pool.verify(["a"] * 10, ["a"] * 10) == [Verdict(1.0, "ok")] * 10


def test_a_hang_costs_its_timeout_once(monkeypatch):
    started_workers = []
    start = WorkerProcess.__init__
    monkeypatch.setattr(
        WorkerProcess, "__init__", lambda self, *arguments: (started_workers.append(self), start(self, *arguments))[1]
    )
    with VerifierPool(misbehaving.score, workers=1, timeout_s=2.0) as pool:
        pool.verify(["a"], ["a"])
        started = time.monotonic()
        verdicts = pool.verify(["a", "hang", "a"], ["a"] * 3)
        assert [verdict.status for verdict in verdicts] == ["ok", "timeout", "ok"]
        assert verdicts[1].detail == "no verdict within 2 s"
        assert time.monotonic() - started >= 2.0
    assert len(started_workers) == 2  # a worker is replaced after every timeout


def test_warm_up_does_not_count_against_the_first_item():
    with VerifierPool(misbehaving.SlowToStart(), workers=1, timeout_s=2.0) as pool:
        assert pool.verify(["a"], ["a"]) == [Verdict(1.0, "ok")]


def test_calls_from_several_threads_share_the_timeouts(monkeypatch):
    """Eight calls with one hanging item each. Calls that arrive while the first is verified are verified together."""
    serve, served = VerifierPool._serve, []

    def serve_once_all_others_wait(self, requests):
        while not served and len(self._waiting) < 7:
            time.sleep(0.01)
        served.append(len(requests))
        serve(self, requests)

    batches = [["hang", *[f"good {i} {j}" for j in range(5)]] for i in range(8)]
    with VerifierPool(misbehaving.score, workers=8, timeout_s=2.0) as pool, ThreadPoolExecutor(8) as threads:
        monkeypatch.setattr(VerifierPool, "_serve", serve_once_all_others_wait)
        verdicts = list(threads.map(lambda batch: pool.verify(batch, [*batch[:3], "no", *batch[4:]]), batches))
        assert served == [1, 7]
        for group in verdicts:
            assert [verdict.status for verdict in group] == ["timeout"] + ["ok"] * 5
            assert [verdict.reward for verdict in group] == [0, 1, 1, 0, 1, 1]
        assert pool.counts["timeout"] == 8


def test_items_after_a_failed_one_are_shared_among_the_workers(tmp_path):
    """Two items of the failed item's chunk wait for each other, so they finish only if two workers run them."""
    items = ["leave", "meet", "meet", *["a"] * 61]
    with VerifierPool(misbehaving.score, workers=2, timeout_s=60) as pool:
        verdicts = pool.verify(items, [str(tmp_path) if item == "meet" else item for item in items])
    assert [verdict.status for verdict in verdicts] == ["crash"] + ["ok"] * 63


def test_a_failed_batch_fails_every_thread_that_shared_it():
    with VerifierPool(build_verifier("countdown"), workers=1) as pool, ThreadPoolExecutor(4) as threads:
        results = [threads.submit(pool.verify, ["3*5=15"], ["22"]) for _ in range(4)]
        errors = [result.exception() for result in results]
    assert all(isinstance(error, UserError | RuntimeError) for error in errors)
    assert any("expected an answer like" in str(error) for error in errors)


def test_the_timeout_is_per_item_not_per_batch():
    with VerifierPool(misbehaving.score, workers=1, timeout_s=2.0) as pool:
        assert {verdict.status for verdict in pool.verify(["sleep"] * 8, ["sleep"] * 8)} == {"ok"}


def test_a_wait_for_the_processor_that_has_not_ended_does_not_count(monkeypatch):
    """Linux adds such a wait to the statistics only when it ends."""
    ran, state = 1.0, "R"
    monkeypatch.setattr(worker_process, "_processor_seconds", lambda pid: (ran, 0.0))
    monkeypatch.setattr(WorkerProcess, "_state", lambda worker: state)
    with VerifierPool(misbehaving.score, workers=1) as pool:
        pool.wait_until_loaded()
        (worker,) = pool._workers
        worker.pending.append(0)
        worker._ran_s = None
        for _ in range(3):  # it is in the queue
            worker.deadline = 0.0
            assert worker.failure() is None
        ran, worker.deadline = 1.5, 0.0  # it has computed, for longer than the limit
        assert worker.failure() is not None
        ran, worker.deadline, worker._ran_s, state = 1.5, 0.0, None, "S"  # it waits for something else
        assert worker.failure() is not None


def test_time_without_a_processor_does_not_count():
    """Four workers that compute share one processor: each takes longer than its limit, but computes for less."""
    one = sorted(os.sched_getaffinity(0))[:1]
    with VerifierPool(misbehaving.compute, workers=4, timeout_s=2.0) as pool:
        pool.verify(["0.01"] * 8, ["a"] * 8)
        for worker in pool._workers:
            os.sched_setaffinity(worker.process.pid, one)
        verdicts = pool.verify(["1.2"] * 4, ["a"] * 4)
        assert [verdict.status for verdict in verdicts] == ["ok"] * 4
        assert pool.verify(["60"], ["a"])[0].status == "timeout"


def test_children_of_a_hung_worker_are_killed_with_it():
    nap = f"5900.{os.getpid()}"  # no other process sleeps exactly that long
    with VerifierPool(misbehaving.score, workers=1, timeout_s=2.0) as pool:
        assert pool.verify(["hang with a child"], [nap])[0].status == "timeout"
    while ["sleep", nap] in _command_lines():  # never ends if the child was not killed
        time.sleep(0.05)


def _command_lines() -> list[list[str]]:
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            lines.append(path.read_text().split("\0")[:-1])
    return lines


def test_a_worker_killed_between_batches_is_replaced():
    with VerifierPool(misbehaving.process_id, workers=1) as pool:
        first = int(pool.verify(["a"], ["a"])[0].reward)
        os.kill(first, signal.SIGKILL)
        pool._workers[0].process.wait()
        verdicts = pool.verify(["a", "b", "c"], [0, 0, 0])
        assert [verdict.status for verdict in verdicts] == ["ok"] * 3  # a correct answer does not lose its reward
        assert verdicts[-1].reward != first


def test_verdicts_are_in_order_with_many_workers_and_batches():
    with VerifierPool(misbehaving.score, workers=3) as pool:
        for batch in range(3):
            answers = [str((i * 7 + batch) % 5) for i in range(1000)]
            rewards = [verdict.reward for verdict in pool.verify(["3"] * 1000, answers)]
            assert rewards == [float(answer == "3") for answer in answers]
        assert pool.verify([], []) == []
        assert pool.counts["ok"] == 3000


def test_long_completions():
    texts = [letter * 3_000_000 for letter in "abcd"]
    with VerifierPool(misbehaving.score, workers=2) as pool:
        assert [verdict.reward for verdict in pool.verify(texts, [texts[0]] * 4)] == [1, 0, 0, 0]


def test_workers_do_not_have_torch(monkeypatch):
    # The trainer has loaded torch. A forked worker would have it too.
    monkeypatch.setitem(sys.modules, "torch", types.ModuleType("torch"))
    with VerifierPool(misbehaving.knows_torch, workers=1) as pool:
        assert pool.verify([""], [""])[0].reward == 0.0


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("completion", "detail"),
    [
        ("raise", "KeyError: 'no such thing'"),
        ("return text", "ValueError: could not convert string to float: 'good'"),
        ("return nan", "the verifier returned nan"),
    ],
)
def test_an_error_of_the_verifier_is_reported_once(workers, completion, detail, caplog):
    with caplog.at_level(logging.WARNING), VerifierPool(misbehaving.score, workers=workers) as pool:
        assert pool.verify([completion] * 2, [1, 2]) == [Verdict(0.0, "error", detail)] * 2
        pool.verify([completion], [1])
    assert [detail in record.getMessage() for record in caplog.records] == [True]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_answer_of_the_wrong_form_ends_the_run(workers):
    with (
        VerifierPool(build_verifier("countdown"), workers=workers) as pool,
        pytest.raises(UserError, match=r"expected an answer like .* found '22'"),
    ):
        pool.verify(["3*5=15"] * 9, ["22"] * 9)


def test_workers_agree_with_in_process():
    texts = ["3*5=15;15+7=22;22*2=44", "3*5=15;15+7=22", "nonsense", "(3*5+7)*2"] * 8
    answers = [COUNTDOWN_ANSWER] * len(texts)
    with VerifierPool(build_verifier("countdown"), workers=2) as pool:
        verdicts = pool.verify(texts, answers)
    assert verdicts == VerifierPool(build_verifier("countdown")).verify(texts, answers)
    assert [verdict.reward for verdict in verdicts] == [1, 0, 0, 1] * 8


def test_countdown_in_process_is_fast():
    texts = ["3 * 5 = 15 ; 15 + 7 = 22 ; 22 * 2 = 44"] * 1024
    pool = VerifierPool(build_verifier("countdown"))
    times = []
    for _ in range(5):
        started = time.process_time()
        verdicts = pool.verify(texts, [COUNTDOWN_ANSWER] * 1024)
        times.append(time.process_time() - started)
    assert all(verdict.reward == 1 for verdict in verdicts)
    print(f"\n1024 countdown completions: {min(times) * 1e3:.1f} ms")
    assert min(times) < 0.03  # measured: 4 ms


def test_workers_end_with_a_killed_trainer(tmp_path):
    program = (
        "import sys, time; sys.path.insert(0, sys.argv[1]); import verifiers_that_misbehave as m\n"
        "from megatron_rlvr.verifiers import VerifierPool\n"
        "pool = VerifierPool(m.process_id, workers=1)\n"
        "print(int(pool.verify([''], [''])[0].reward), flush=True); time.sleep(6000)\n"
    )
    folder = str(Path(__file__).parent)
    with subprocess.Popen([sys.executable, "-c", program, folder], stdout=subprocess.PIPE, text=True) as trainer:
        worker = int(trainer.stdout.readline())
        trainer.kill()
    while True:
        try:
            alive = Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except (FileNotFoundError, ProcessLookupError):
            alive = False
        if not alive:
            break
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"workers": -1}, "workers"), ({"timeout_s": 0}, "timeout"), ({"memory_mb": 10}, "memory limit")],
)
def test_impossible_limits(options, message):
    with pytest.raises(UserError, match=message):
        VerifierPool(misbehaving.score, **options)


def test_a_verifier_that_cannot_be_pickled():
    with pytest.raises(UserError, match="cannot be sent to worker processes"):
        VerifierPool(lambda completion, answer: 1.0, workers=1)


def test_misuse():
    pool = VerifierPool(misbehaving.score)
    with pytest.raises(ValueError, match="2 completions but 1 answers"):
        pool.verify(["a", "b"], ["a"])
    pool.close()
    with pytest.raises(RuntimeError, match="closed"):
        pool.verify(["a"], ["a"])
