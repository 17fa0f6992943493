"""Training runs on servers that die, misbehave, or compute another policy."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import pytest
from fake_sglang import FakeServer, fake_server

from megatron_rlvr.megatron import waiting
from megatron_rlvr.rollout.prefetch import RolloutPrefetcher
from megatron_rlvr.train import main
from megatron_rlvr.training.policy import Policy


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    with fake_server() as server:
        yield server


def _random_answers(fake: FakeServer) -> Callable[[dict[str, Any]], tuple[int, Any]]:
    """Answer each prompt with one of two tokens, in turn."""
    drawn = [0]

    def answer(body: dict[str, Any]) -> tuple[int, Any]:
        completions = []
        for _ in body["input_ids"]:
            drawn[0] += 1
            token = 10 + drawn[0] % 2
            meta = {"finish_reason": {"type": "length"}, "output_token_logprobs": [[-0.5, token, None]]}
            completions.append({"output_ids": [token], "meta_info": meta | {"weight_version": fake.version}})
        return 200, completions

    return answer


@pytest.fixture
def command(fake: FakeServer, run_yaml: Path) -> list[str]:
    """The command of a run of four steps on a server that always draws one of two tokens."""
    fake.answer = _random_answers(fake)
    settings = ["steps=4", "data.heldout=null", "checkpoint.export_huggingface=false", "checkpoint.every=0"]
    engine = ["engine=sglang", f"sglang.urls=[{fake.url}]", "sglang.start_timeout_seconds=200", "mismatch_alarm=0"]
    return [str(run_yaml), *settings, *[f"rollout.{setting}" for setting in engine]]


def _steps(run: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_losing_all_servers_writes_a_checkpoint_from_which_the_run_resumes(
    fake: FakeServer, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = fake.answer

    def die(body: dict[str, Any]) -> tuple[int, Any]:
        if fake.version == "2":
            fake.dead = True
            return 0, None
        return answer(body)

    fake.answer = die
    short = "rollout.sglang.start_timeout_seconds=5"  # the run gives up after this many seconds without a server
    assert main([*command, short]) == 75
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if line.startswith("error: no SGLang server is left: http")] == lines[-1:]
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == "step_2"
    assert _steps(tmp_path / "run") == [0, 1]
    fake.answer, fake.dead = answer, False
    assert main(command) == 0
    assert _steps(tmp_path / "run") == [0, 1, 2, 3]
    assert [load["weight_version"] for load in fake.loads] == ["0", "1", "2", "0", "2", "3", "4"]


def test_no_prompt_is_lost_when_servers_die_twenty_times(
    fake: FakeServer, command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two servers die at random moments, in rollouts and in updates, and come back with their first weights.

    tests/integration/sglang/kill_at_random.py does the same with real servers, which takes minutes.
    """
    monkeypatch.setattr("megatron_rlvr.rollout.engines.sglang.client._PROBE_PERIOD_S", 0.05)
    draw, deaths = random.Random(0), dict.fromkeys(("/generate", "/update_weights_from_disk"), 0)

    def let_die_at_random(server: FakeServer) -> None:
        reply = server.reply

        def come_back() -> None:
            server.version, server.dead = "0", False

        def reply_or_die(path: str, body: dict[str, Any]) -> tuple[int, Any]:
            answer = reply(path, body)
            if path in deaths and not server.dead and draw.random() < 0.3:  # all requests that it works on are lost
                server.dead = True
                deaths[path] += 1
                threading.Timer(draw.uniform(0.02, 0.1), come_back).start()
            return (0, None) if server.dead else answer

        server.reply, server.delay = reply_or_die, 0.02  # type: ignore[method-assign]

    with fake_server() as other:
        other.answer = _random_answers(other)
        let_die_at_random(fake)
        let_die_at_random(other)
        urls = f"rollout.sglang.urls=[{fake.url},{other.url}]"
        settings = ["rollout.sglang.start_timeout_seconds=200", "rollout.sglang.attempts=100", "rollout.record=true"]
        assert main([*command, urls, *settings, "rollout.sglang.concurrency=8", "steps=8"]) == 0
    assert sum(deaths.values()) >= 20 and min(deaths.values()) >= 2, deaths
    for step in range(8):
        files = sorted((tmp_path / "run" / "rollouts" / f"step_{step:06d}").glob("*.jsonl"))
        assert [file.name for file in files] == [f"prompt_{slot:05d}.jsonl" for slot in range(8)]
        for file in files:
            rows = [json.loads(line) for line in file.read_text().splitlines()]
            assert len(rows) == 4 and {row["weight_version"] for row in rows} == {step}


def _answer_malformed(fake: FakeServer) -> None:
    answer = fake.answer
    fake.answer = lambda body: (200, "<html>") if fake.version == "2" else answer(body)


def _refuse_weights(fake: FakeServer) -> None:
    load = fake.load
    fake.load = lambda body: (  # type: ignore[method-assign]
        (400, {"success": False, "message": "no room"}) if body["weight_version"] == "2" else load(body)
    )


def _keep_old_version(fake: FakeServer) -> None:
    load = fake.load
    fake.load = lambda body: (  # type: ignore[method-assign]
        (200, {"success": True}) if body["weight_version"] == "2" else load(body)
    )


@pytest.mark.parametrize(
    ("misbehave", "expected"),
    [
        (_answer_malformed, "sent a malformed reply"),
        (_refuse_weights, "did not load the weights in"),
        (_keep_old_version, "serves weights of version 1 after it was sent version 2"),
    ],
)
def test_server_error_ends_the_run_with_a_checkpoint_of_every_step(
    misbehave: Callable[[FakeServer], None],
    expected: str,
    fake: FakeServer,
    command: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One line, a checkpoint of the finished steps, status 2; the run resumes once the server is corrected."""
    answer, load = fake.answer, fake.load
    misbehave(fake)
    assert main(command) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:] and expected in lines[-1]
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == "step_2"
    assert _steps(tmp_path / "run") == [0, 1]
    fake.answer, fake.load = answer, load  # type: ignore[method-assign]
    assert main(command) == 0
    assert _steps(tmp_path / "run") == [0, 1, 2, 3]


def test_engine_that_computes_another_policy_stops_the_run(
    fake: FakeServer, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, "rollout.mismatch_alarm=0.1", "rollout.mismatch_patience=2"]) == 2
    errors = capsys.readouterr().err
    assert errors.count("warning: KL(rollout || train) of step 0") == 1
    assert "error: KL(rollout || train) of step 1 is" in errors and "2th" not in errors
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == "step_1"


@pytest.mark.parametrize("interrupt", ["retract", "in_place", "finish"])
def test_rollouts_ahead_of_training(
    fake: FakeServer, command: list[str], tmp_path: Path, interrupt: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Servers are paused around each update, and no token that is trained on is more than one version old.

    While a process may expect the weights before an update, their folder is there for a server that comes back.
    """
    asked: list[str] = []
    barrier, held = waiting.barrier, dict[str, list[str]]()

    def barrier_before_an_update(what: str) -> None:
        if what.startswith("the start of the update"):
            held[what.split()[-1]] = sorted(path.name for path in (tmp_path / "run" / "sglang" / "weights").iterdir())
        barrier(what)

    def control(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        asked.append(path if path != "/pause_generation" else f"{path} {body['mode']}")
        return 200, {"status": "ok"}

    fake.control, fake.delay = control, 0.01
    take, update = RolloutPrefetcher.take, Policy.update
    prefetchers: list[RolloutPrefetcher[Any]] = []

    def take_and_remember(self: RolloutPrefetcher[Any], step: int) -> Any:
        prefetchers.append(self)
        return take(self, step)

    def update_after_a_rollout_ahead(*arguments: Any) -> Any:
        # The rollout of the second step is complete before the weights change for the first time.
        if len(prefetchers) == 1:
            wait([prefetchers[0]._pending[1]])
        return update(*arguments)

    monkeypatch.setattr(waiting, "barrier", barrier_before_an_update)
    monkeypatch.setattr(RolloutPrefetcher, "take", take_and_remember)
    monkeypatch.setattr(Policy, "update", update_after_a_rollout_ahead)
    settings = ["max_staleness=1", f"sglang.interrupt={interrupt}", "record=true", "sglang.concurrency=8"]
    settings += ["dynamic_sampling=true", "over_sampling=1.5"]
    assert main([*command, *[f"rollout.{setting}" for setting in settings]]) == 0
    run = tmp_path / "run"
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert metrics[0]["staleness/mean"] == 0 and max(r["staleness/mean"] for r in metrics) > 0
    assert all(r["staleness/mean"] <= 1 for r in metrics)
    for step in range(4):
        files = sorted((run / "rollouts" / f"step_{step:06d}").glob("*.jsonl"))
        versions = {json.loads(line)["weight_version"] for file in files for line in file.read_text().splitlines()}
        assert len(files) == 8 and versions <= {max(0, step - 1), step}
    pauses = [path for path in asked if path.startswith("/pause")]
    assert pauses == ([] if interrupt == "finish" else [f"/pause_generation {interrupt}"] * 4)
    assert asked.count("/continue_generation") >= len(pauses)
    assert held == {str(n): [f"step_{v:06d}" for v in (n - 1, n) if v] for n in range(1, 5)}
