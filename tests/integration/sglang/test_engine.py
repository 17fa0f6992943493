"""The engine on the real SGLang: log-probs match the trainer's, weights are updated, dead servers are replaced."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest
import torch

from megatron_rlvr.config import Config, resolve
from megatron_rlvr.data.batch import RolloutBatch
from megatron_rlvr.data.completion import Completion
from megatron_rlvr.data.kept_tokens import KeptTokens
from megatron_rlvr.errors import UserError
from megatron_rlvr.megatron import parallel
from megatron_rlvr.megatron.config import ModelConfig, ParallelConfig
from megatron_rlvr.rollout.config import RolloutConfig
from megatron_rlvr.rollout.engines.sglang.config import SGLangConfig
from megatron_rlvr.rollout.engines.sglang.server_key import headers, key_from_environment
from megatron_rlvr.rollout.mismatch import MismatchAlarm
from megatron_rlvr.rollout.sampling import SamplingSettings, kept_tokens
from megatron_rlvr.training.rollout_metrics import measure_rollout
from tests.generation import generate
from tests.planted_faults import exchanged_layers, in_float8
from tests.small_model import make_small_model

WEIGHT_SYNCS = ("disk", "tensor", "distributed", "delta")
TEMPERATURE = 0.8
STOPS = (*range(8), 108)  # 108 is the model's end of sequence, at which SGLang stops in any case
PROMPTS = [[3, 4, 5, 105, 9, 106], [7, 8, 9, 10, 105, 50, 106]]
SAMPLING = SamplingSettings(samples=6, max_tokens=12, temperature=TEMPERATURE, stop_token_ids=STOPS)


@pytest.fixture(scope="module")
def layout() -> Iterator[parallel.Layout]:
    with parallel.parallel_groups(ParallelConfig(), seed=0) as layout:
        yield layout


@pytest.fixture
def policy(layout: parallel.Layout, small_model: Path):
    from megatron_rlvr.training.policy import Policy

    rollout = RolloutConfig(temperature=TEMPERATURE)
    return Policy(resolve(Config(model=ModelConfig(path=str(small_model)), rollout=rollout), on_gpu=False), layout)


@pytest.fixture
def engine(policy, servers, sglang: SGLangConfig, tmp_path: Path, request: pytest.FixtureRequest):
    """An engine for one test on the shared server. It restarts the server as if it had started it."""
    from megatron_rlvr.rollout.engines.sglang.engine import SGLangEngine

    local = str(tmp_path / "node")
    settings = {"bucket_mb": 1, "check_weights": True, "local_folder": local, **getattr(request, "param", {})}
    config = Config(rollout=RolloutConfig(sglang=dataclasses.replace(sglang, urls=servers.urls, **settings)))
    with ExitStack() as resources:
        engine = SGLangEngine(resolve(config, on_gpu=False).rollout, tmp_path / "run" / "sglang", policy, resources)
        engine.pool = engine.weight_sync.pool = servers
        yield engine
    servers.start_with(policy.bridge.path, 0)


def _scores(policy, prompts: list[list[int]], completions: list[Completion]) -> torch.Tensor:
    """Log-probs of all tokens of all completions from the trainer's scoring pass."""
    batch = RolloutBatch.from_completions(prompts, completions, [0.0] * len(completions), padding=109)
    return policy.score(batch, torch.zeros(len(completions))).logprob


def _difference(policy, prompts: list[list[int]], completions: list[Completion]) -> float:
    """The largest difference between the engine's log-probs and the trainer's."""
    engine = torch.tensor([value for completion in completions for value in completion.logprobs])
    return (_scores(policy, prompts, completions) - engine).abs().max().item()


def _wait_until_decoding(log: Path, log_end: int) -> None:
    """Wait for a decoding step in the part of a server's log after its first `log_end` bytes."""
    deadline = time.monotonic() + 200
    while b"Decode batch" not in log.read_bytes()[log_end:]:
        assert time.monotonic() < deadline, f"no decoding step in {log}"
        time.sleep(0.005)


def _perturb(policy, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.model_chunks[-1].parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)


@pytest.mark.parametrize("engine", [{"weight_sync": sync} for sync in WEIGHT_SYNCS], indirect=True, ids=WEIGHT_SYNCS)
def test_logprobs_match_the_trainer_before_and_after_each_sync(policy, engine, tmp_path: Path, capsys) -> None:
    # The server samples without a seed. Of so few as 12 completions, all reach a stop token in one run of 200.
    sampling = dataclasses.replace(SAMPLING, samples=30)
    completions = generate(engine, PROMPTS, sampling)
    assert len(completions) == 60 and {c.weight_version for c in completions} == {0}
    assert {c.finish_reason for c in completions} == {"stop", "length"}
    for completion in completions:
        ids = completion.token_ids
        assert (ids[-1] in STOPS) == (completion.finish_reason == "stop") and not set(ids[:-1]) & set(STOPS)
        assert completion.finish_reason == "stop" or len(ids) == 12
    assert len({tuple(c.token_ids) for c in completions}) > 6  # a short completion may be drawn twice
    assert _difference(policy, PROMPTS, completions) < 1e-4
    for version in (1, 2):
        _perturb(policy, seed=version)
        assert _difference(policy, PROMPTS, completions) > 1e-2  # the change is large enough for the comparison
        engine.update_weights(version)
        completions = generate(engine, PROMPTS, sampling)
        assert {c.weight_version for c in completions} == {version}
        assert _difference(policy, PROMPTS, completions) < 1e-4
    engine.weight_sync.folders.wait()
    kept = [path.name for folder in ("run/sglang/weights", "node") for path in (tmp_path / folder).glob("**/step_*")]
    assert kept == ["step_000002"]
    assert "through the disk this time" not in capsys.readouterr().err


def test_kept_sets_are_those_of_the_definition(policy, engine) -> None:
    """The temperature, then top-k and top-p of one distribution: the server keeps what float64 keeps."""
    sampling = dataclasses.replace(SAMPLING, top_k=60, top_p=0.603, stop_token_ids=(), returns_kept=True)
    completions = generate(engine, PROMPTS, sampling)
    whole = [dataclasses.replace(c, kept=KeptTokens.of([list(range(112))] * len(c.token_ids))) for c in completions]
    assert _difference(policy, PROMPTS, completions) < 1e-4 < _difference(policy, PROMPTS, whole)
    # The probability of every token of the vocabulary at the first position of each prompt, one completion per token.
    everything = [Completion([token], [0.0], "stop", 0) for _ in PROMPTS for token in range(112)]
    first = _scores(policy, PROMPTS, everything).view(len(PROMPTS), 112).double().exp()
    for number, completion in enumerate(completions):
        expected = kept_tokens(first[number // sampling.samples][None], sampling.top_p, sampling.top_k)[0]
        assert completion.kept is not None
        assert sorted(completion.kept.sets()[0]) == expected.nonzero()[:, 0].tolist()
        assert len(completion.kept.sets()[0]) < 60


def test_logprobs_are_over_the_full_vocabulary_under_top_k(policy, engine) -> None:
    sampling = dataclasses.replace(SAMPLING, top_k=3, top_p=0.9, stop_token_ids=())
    completions = generate(engine, PROMPTS, sampling)
    assert all(len(c.token_ids) == 12 for c in completions)
    assert _difference(policy, PROMPTS, completions) < 1e-4


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "hung"])
def test_server_lost_in_a_rollout(number: signal.Signals, policy, engine, servers) -> None:
    _perturb(policy, seed=5)
    engine.update_weights(7)
    prompts = [[3 + p % 90, 4, 5, 105, 9, 106] for p in range(48)]
    sampling = SamplingSettings(samples=8, max_tokens=40, temperature=TEMPERATURE)
    server = servers.servers[0]
    starts, log_end = server.starts, len(server.log.read_bytes())

    def strike() -> None:
        _wait_until_decoding(server.log, log_end)
        os.killpg(server.process.pid, number)

    thread = threading.Thread(target=strike)
    thread.start()
    completions = generate(engine, prompts, sampling)
    thread.join()
    assert server.starts == starts + 1, "the rollout ended before the server was struck"
    assert len(completions) == 384 and {len(c.token_ids) for c in completions} == {40}
    assert {c.weight_version for c in completions} == {7}
    # Each completion belongs to its prompt, under the new weights.
    assert _difference(policy, prompts, completions) < 1e-4


@pytest.mark.parametrize(
    ("engine", "interrupt"),
    [
        ({"weight_sync": "tensor"}, "retract"),
        ({"weight_sync": "disk"}, "in_place"),
        ({"weight_sync": "tensor"}, "finish"),
    ],
    indirect=["engine"],
    ids=["retract", "in_place", "finish"],
)
def test_weights_change_under_completions(interrupt: str, policy, engine, servers, monkeypatch) -> None:
    """Each token has the version of its weights. After a retract, only the new weights generate the other tokens."""
    engine.state.max_staleness, engine.config.interrupt = 1, interrupt
    prompts = [[3 + p % 90, 4, 5, 105, 9, 106] for p in range(24)]
    sampling = SamplingSettings(samples=8, max_tokens=50, temperature=TEMPERATURE)
    log, completions = servers.servers[0].log, []
    log_end = len(log.read_bytes())
    thread = threading.Thread(target=lambda: completions.extend(generate(engine, prompts, sampling)))

    def start_generating() -> None:
        thread.start()
        _wait_until_decoding(log, log_end)

    before = {name: value.clone() for name, value in policy.model_chunks[-1].state_dict().items() if value is not None}
    _perturb(policy, seed=9)
    if engine.weight_sync.transport is None:  # writing the folder could take longer than all completions
        write = engine.weight_sync.folders.write
        monkeypatch.setattr(
            engine.weight_sync.folders, "write", lambda *a, **options: (write(*a, **options), start_generating())
        )
    else:
        start_generating()
    engine.update_weights(1)
    thread.join()
    assert len(completions) == 192 and {len(c.token_ids) for c in completions} == {50}
    changed = [c for c in completions if c.version_spans]
    if interrupt == "finish":
        assert not changed and {c.weight_version for c in completions} == {0}
    else:
        assert changed, "no completion was in flight"
        assert all([version for version, _ in c.version_spans] == [0, 1] for c in changed)
    sampled = torch.tensor([value for c in completions for value in c.logprobs])
    drawn_by = torch.tensor(
        [v for c in completions for v, n in (c.version_spans or ((c.weight_version, 50),)) for _ in range(n)]
    )
    new = _scores(policy, prompts, completions)
    policy.model_chunks[-1].load_state_dict(before, strict=False)
    old = _scores(policy, prompts, completions)
    assert (sampled - old)[drawn_by == 0].abs().max() < 1e-4
    if interrupt == "retract":
        assert (sampled - new)[drawn_by == 1].abs().max() < 1e-4
    assert (sampled - new)[drawn_by == 0].abs().max() > 1e-2


@pytest.mark.parametrize("engine", [{"weight_sync": "distributed", "update_timeout_seconds": 20.0}], indirect=True)
def test_broadcast_that_a_server_refuses(policy, engine, capsys) -> None:
    """A server that refuses the group loads the copy on disk, and joins a new group for the next update."""
    _perturb(policy, seed=11)
    engine.update_weights(1)
    engine.weight_sync.transport.group_name = "another"
    for version in (2, 3):
        _perturb(policy, seed=11 + version)
        engine.update_weights(version)
        completions = generate(engine, PROMPTS, SAMPLING)
        assert {c.weight_version for c in completions} == {version}
        assert _difference(policy, PROMPTS, completions) < 1e-4
        assert ("weights of step 2 go through the disk this time" in capsys.readouterr().err) == (version == 2)


def test_surplus_prompts_are_aborted_at_the_server(engine, servers) -> None:
    """Ten of forty prompts are enough. The others stop at once, and the server is idle again."""
    prompts = [[3 + p % 90, 4, 5, 105, 9, 106] for p in range(40)]
    done: list[int] = []

    async def finished(index: int, completions: list[Completion]) -> bool:
        done.append(index)
        return len(done) >= 10

    sampling = SamplingSettings(samples=4, max_tokens=50, temperature=TEMPERATURE)
    engine.config.concurrency = 4 * 15
    completions = generate(engine, prompts, sampling, finished)
    assert 10 <= len(done) <= 15 and len(completions) == 4 * len(done)
    generate(engine, prompts[:1], sampling)
    while _running(servers.urls[0]):
        time.sleep(0.1)


def _running(url: str) -> int:
    """Return the number of running and waiting requests of a server."""
    loads = httpx.get(f"{url}/v1/loads?include=core", headers=headers(key_from_environment()), timeout=200.0).json()[
        "loads"
    ]
    return sum(load["num_running_reqs"] + load["num_waiting_reqs"] for load in loads)


def test_only_the_holder_of_the_key_can_replace_the_weights(servers, small_model: Path) -> None:
    url, body = f"{servers.urls[0]}/update_weights_from_disk", {"model_path": str(small_model), "weight_version": "77"}
    for wrong in (None, "another", servers.key[:-1]):
        assert httpx.post(url, json=body, headers=headers(wrong), timeout=200.0).status_code == 401
    info = f"{servers.urls[0]}/model_info"
    assert httpx.get(info, timeout=200.0).status_code == 401
    assert httpx.get(info, headers=headers(servers.key), timeout=200.0).json()["weight_version"] != "77"
    assert httpx.post(url, json=body, headers=headers(servers.key), timeout=200.0).json()["success"]
    assert httpx.get(info, headers=headers(servers.key), timeout=200.0).json()["weight_version"] == "77"
    shown = subprocess.run(["ps", "-eww", "-o", "args"], capture_output=True, text=True).stdout
    assert "launch_with_key.py" in shown and servers.key not in shown
    log = servers.servers[0].log
    assert "server_args=" in log.read_text() and servers.key not in log.read_text()
    assert log.stat().st_mode & 0o077 == 0


def test_memory_is_released_and_resumed(policy, engine) -> None:
    """On the CPU both commands have no effect but must be answered; log-probs match afterwards.

    A request that still runs is aborted first: releasing the memory under it would end the scheduler.
    """
    engine.config.release_memory = True
    body = {"input_ids": [PROMPTS[0]] * 4, "sampling_params": {"max_new_tokens": 58, "ignore_eos": True}}
    with ThreadPoolExecutor(1) as other:
        key = headers(key_from_environment())
        request = other.submit(httpx.post, f"{engine.urls[0]}/generate", json=body, headers=key, timeout=200.0)
        while not _running(engine.urls[0]) and not request.done():
            pass
        engine.offload()
        assert request.result().status_code == 200
    _perturb(policy, seed=4)
    engine.update_weights(3)
    completions = generate(engine, PROMPTS, SAMPLING)
    assert {c.weight_version for c in completions} == {3}
    assert _difference(policy, PROMPTS, completions) < 1e-4


def test_a_prompt_that_does_not_fit_into_the_context_is_refused(engine) -> None:
    with pytest.raises(UserError, match=r"a prompt of 6 tokens and rollout.max_tokens=60 exceed .* of 64 tokens"):
        generate(engine, [PROMPTS[0]], dataclasses.replace(SAMPLING, max_tokens=60))


def test_another_model_behind_the_url(layout, servers, sglang: SGLangConfig, tmp_path: Path) -> None:
    from megatron_rlvr.rollout.engines.sglang.engine import SGLangEngine
    from megatron_rlvr.training.policy import Policy

    other = make_small_model(tmp_path / "other", hidden=48)
    config = Config(model=ModelConfig(path=str(other)))
    config.rollout = RolloutConfig(sglang=dataclasses.replace(sglang, urls=servers.urls))
    config = resolve(config, on_gpu=False)
    policy = Policy(config, layout)
    with ExitStack() as resources, pytest.raises(UserError, match="hidden_size=32 instead of 48"):
        SGLangEngine(config.rollout, tmp_path / "run" / "sglang", policy, resources)
    assert servers.servers[0].passes_health_check(200.0)


def test_faults_of_a_server_ring_the_mismatch_alarm(policy, engine, layout: parallel.Layout) -> None:
    """Another temperature, a cut distribution, FP8, exchanged layers, and weights that are old, all or in one layer."""
    config = Config(rollout=RolloutConfig(temperature=TEMPERATURE, mismatch_alarm=1e-4))
    right = SamplingSettings(samples=32, max_tokens=16, temperature=TEMPERATURE, stop_token_ids=())
    prompts = [[3 + i, 4, 5, 105, 9, 106] for i in range(6)]

    def warned(completions: list[Completion]) -> bool:
        alarm = MismatchAlarm.build(config, True, True)
        batch = RolloutBatch.from_completions(prompts, completions, [0.0] * len(completions), padding=109)
        scores = policy.score(batch, torch.zeros(len(completions)))
        measured = measure_rollout(batch, torch.ones(len(completions)), scores, layout)
        assert measured.metrics["tokens"] > 1000
        alarm.observe(0, measured.metrics)
        return alarm.warned > 0

    drawn = generate(engine, prompts, right)
    assert not warned(drawn)
    assert warned(generate(engine, prompts, dataclasses.replace(right, temperature=0.6)))
    assert warned(generate(engine, prompts, dataclasses.replace(right, top_p=0.7, returns_kept=False)))
    parameters = dict(policy.model_chunks[-1].named_parameters())
    own = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    for version, fault in enumerate((in_float8, exchanged_layers), start=1):
        for name, weight in fault(own, own).items():
            parameters[name].data.copy_(weight)
        engine.update_weights(version)
        for name, weight in own.items():
            parameters[name].data.copy_(weight)
        assert warned(generate(engine, prompts, right)), fault
    layers = [p for name, p in policy.model_chunks[-1].named_parameters() if ".layers.1." in name]
    for parameters in (layers, list(policy.model_chunks[-1].parameters())):
        with torch.no_grad():
            for parameter in parameters:  # the trainer moves on, and the server keeps what it has
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        assert warned(drawn)
