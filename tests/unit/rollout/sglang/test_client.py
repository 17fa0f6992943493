"""The client against servers that answer in time, late, never, or with malformed replies."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from fake_sglang import FakeServer, fake_server

from megatron_rlvr.data.completion import Completion
from megatron_rlvr.errors import UserError
from megatron_rlvr.rollout.engines.base import EngineLostError
from megatron_rlvr.rollout.engines.sglang.client import Client
from megatron_rlvr.rollout.engines.sglang.config import SGLangConfig
from megatron_rlvr.rollout.engines.sglang.endpoint import Endpoint
from megatron_rlvr.rollout.engines.sglang.http import ConnectionLostError, Connections
from megatron_rlvr.rollout.engines.sglang.protocol import largest_reply, sampling_parameters
from megatron_rlvr.rollout.engines.sglang.server_state import ServerState
from megatron_rlvr.rollout.engines.sglang.weight_sync.update import load_on_servers
from megatron_rlvr.rollout.sampling import SamplingSettings
from tests.generation import group_requests

# No request to a working server exceeds these timeouts, however busy the machine is.
CONFIG = SGLangConfig(
    concurrency=10, start_timeout_seconds=200, request_timeout_seconds=200, health_timeout_seconds=200, attempts=3
)
FOLDER = Path(__file__).parent
SAMPLING = SamplingSettings(samples=4, max_tokens=1)
PROMPTS = [[100 * p, p] for p in range(1, 21)]


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    with fake_server() as server:
        yield server


@pytest.fixture
def other() -> Iterator[FakeServer]:
    with fake_server() as server:
        yield server


def _generate(
    urls: Sequence[str], config: SGLangConfig = CONFIG, version: int = 0, prompts: Sequence[list[int]] = PROMPTS
) -> list[Completion]:
    async def ask() -> list[Completion]:
        async with Client(urls, config, ServerState(version, FOLDER)) as client:
            groups = await client.generate(group_requests(prompts, SAMPLING.samples), SAMPLING)
            return [completion for group in groups for completion in group]

    return asyncio.run(ask())


def _wait_until(condition: Callable[[], bool]) -> None:
    while not condition():
        time.sleep(0.005)


def _check(completions: list[Completion], version: int = 0) -> None:
    expected = [Completion([sum(p)], [-0.5], "length", version) for p in PROMPTS for _ in range(SAMPLING.samples)]
    assert completions == expected


def test_concurrency_is_bounded_and_used(fake: FakeServer) -> None:
    fake.delay = 0.02
    fake.wait_before_answer = lambda: _wait_until(lambda: fake.most_running >= 8)
    _check(_generate([fake.url]))
    assert fake.most_running == 8  # two prompts of four samples
    assert len(fake.prompts) == 80


def test_samples_of_a_prompt_go_to_one_server(fake: FakeServer, other: FakeServer) -> None:
    def keep_pace(server: FakeServer, faster: FakeServer) -> None:
        """Make the servers equally fast: until all prompts are sent, none answers more prompts than the other."""
        _wait_until(lambda: server.answered <= faster.answered or len(server.prompts + faster.prompts) == 80)

    fake.wait_before_answer = lambda: keep_pace(fake, other)
    other.wait_before_answer = lambda: keep_pace(other, fake)
    _check(_generate([fake.url, other.url]))
    first, second = ({tuple(p) for p in server.prompts} for server in (fake, other))
    assert not first & second and len(first | second) == 20
    assert min(len(first), len(second)) >= 6


def test_a_long_prompt_is_computed_once_before_its_samples(fake: FakeServer) -> None:
    prompts = [[7, 8, 9], [1, 2]]
    bodies: list[dict[str, Any]] = []
    fake.answer = lambda body: (bodies.append(body), fake.completion(body))[1]
    _generate([fake.url], dataclasses.replace(CONFIG, prefill_once_from=3), prompts=prompts)
    long, short = ([body for body in bodies if body["input_ids"][0] == prompt] for prompt in prompts)
    assert [len(body["input_ids"]) for body in long] == [1, 4] and [len(body["input_ids"]) for body in short] == [4]
    assert [p["max_new_tokens"] for body in long for p in body["sampling_params"]] == [0, 1, 1, 1, 1]


@pytest.mark.parametrize("settings", [{"prefill_once_from": 0}, {"server": {"disable-radix-cache": True}}])
def test_no_prompt_is_computed_beforehand_without_use(fake: FakeServer, settings: dict[str, Any]) -> None:
    config = dataclasses.replace(CONFIG, **({"prefill_once_from": 1} | settings))
    _generate([fake.url], config, prompts=[[7, 8, 9]])
    assert len(fake.prompts) == 4


def test_prompts_of_a_server_that_closes_connections_go_to_another(fake: FakeServer, other: FakeServer) -> None:
    answered: list[int] = []

    def die_after_five(body: dict[str, Any]) -> tuple[int, Any]:
        if len(answered) >= 5:
            return 0, None
        answered.append(1)
        return fake.completion(body)

    fake.answer = die_after_five
    _check(_generate([fake.url, other.url], dataclasses.replace(CONFIG, attempts=50)))
    assert len(answered) == 5 and len(other.prompts) >= 60


def test_hung_server_is_found_by_a_health_check(fake: FakeServer, other: FakeServer) -> None:
    """Only a health check can find it, because the timeout of a request is longer than the timeout of this test."""
    done = threading.Event()

    def hang(_: dict[str, Any]) -> tuple[int, Any]:
        fake.healthy = False
        done.wait()
        return 0, None

    fake.answer = hang
    # The other server may miss a health check on a busy machine. It returns, and its prompts are sent again.
    config = dataclasses.replace(CONFIG, request_timeout_seconds=1e6, health_timeout_seconds=0.5, attempts=1000)
    try:
        _check(_generate([fake.url, other.url], config))
    finally:
        done.set()
    assert not fake.healthy


def test_prompt_that_takes_too_long_is_sent_again(fake: FakeServer) -> None:
    """Its first request is answered only after its second request has arrived."""
    requests: list[int] = []

    def first_request_slow(body: dict[str, Any]) -> tuple[int, Any]:
        if body["input_ids"][0] == PROMPTS[0]:
            requests.append(1)
            _wait_until(lambda: len(requests) > 1)
        return fake.completion(body)

    fake.answer = first_request_slow
    # On a busy machine, other prompts may take too long as well.
    _check(_generate([fake.url], dataclasses.replace(CONFIG, request_timeout_seconds=1.0, attempts=1000)))
    assert fake.prompts.count(PROMPTS[0]) == 4 * len(requests) >= 8


def test_prompt_that_kills_servers_ends_the_run(fake: FakeServer) -> None:
    fake.answer = lambda body: (0, None)
    with pytest.raises(UserError, match="3 SGLang servers were lost under one prompt"):
        _generate([fake.url])


def test_old_weights_are_replaced_before_the_first_prompt(fake: FakeServer) -> None:
    _check(_generate([fake.url], version=4), version=4)
    assert [load["weight_version"] for load in fake.loads] == ["4"]
    assert fake.loads[0]["model_path"] == str(FOLDER) and fake.loads[0]["flush_cache"] is True


def test_server_that_someone_restarted_gets_the_weights_again(fake: FakeServer) -> None:
    fake.version = "4"
    forgot = []

    def forget(body: dict[str, Any]) -> tuple[int, Any]:
        if len(fake.prompts) >= 30 and not forgot:
            forgot.append(1)
            fake.version = "default"
        return fake.completion(body)

    fake.answer = forget
    _check(_generate([fake.url], version=4), version=4)
    assert forgot and [load["weight_version"] for load in fake.loads] == ["4"]


def test_server_that_keeps_its_old_version(fake: FakeServer) -> None:
    fake.load = lambda body: (200, {"success": True})  # type: ignore[method-assign]
    with pytest.raises(UserError, match="serves weights of version 0 after it was sent version 4"):
        _generate([fake.url], version=4)


def test_refused_weights(fake: FakeServer) -> None:
    fake.load = lambda body: (400, {"success": False, "message": "no such folder"})  # type: ignore[method-assign]
    with pytest.raises(UserError, match=r"did not load the weights in /.* .*no such folder"):
        _generate([fake.url], version=4)


def test_another_model_is_refused_before_it_gets_weights(fake: FakeServer) -> None:
    class Trained:
        model_type, architectures = "llama", None

    async def load() -> list[str]:
        return await load_on_servers([Endpoint(fake.url, CONFIG)], ServerState(1, FOLDER), Trained, flush_cache=True)

    with pytest.raises(UserError, match="model_type=qwen2 instead of llama"):
        asyncio.run(load())
    assert not fake.loads


def test_no_server_at_the_address() -> None:
    config = dataclasses.replace(CONFIG, start_timeout_seconds=1.5)
    with pytest.raises(EngineLostError, match=r"no SGLang server is left: http://127.0.0.1:9: .*cannot connect"):
        _generate(["http://127.0.0.1:9"], config)


GOOD = {"finish_reason": {"type": "stop"}, "output_token_logprobs": [[-1.0, 5, None]], "weight_version": "0"}


def _reply(tokens: Any = (5,), logprob: Any = -1.0, scored: Any = None, **meta: Any) -> tuple[int, Any]:
    """Return the answer of a server that differs from a good one in the given values."""
    token = scored if scored is not None else tokens[0] if tokens else 5
    meta = GOOD | {"output_token_logprobs": [[logprob, token, None]] if tokens else []} | meta
    return 200, [{"output_ids": list(tokens) if isinstance(tokens, tuple) else tokens, "meta_info": meta}] * 4


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ((200, "<html>"), "malformed reply"),
        ((200, [GOOD]), "malformed reply .*a list of 4 completions"),
        ((200, [{"output_ids": [5]}] * 4), "malformed reply .*meta_info"),
        ((200, [{"output_ids": [6], "meta_info": GOOD}] * 4), "of other tokens"),
        ((200, [{"output_ids": [5, 5], "meta_info": GOOD}] * 4), "2 tokens with log-probs of 1"),
        ((200, [{"output_ids": [5], "meta_info": GOOD | {"finish_reason": {"type": "bored"}}}] * 4), "'bored'"),
        (
            (200, [{"output_ids": [5], "meta_info": GOOD | {"output_token_logprobs": [[float("nan"), 5]]}}] * 4),
            "not a number",
        ),
        (_reply(tokens=[5.0], scored=5), "the token id float 5.0"),
        (_reply(tokens=[True], scored=1), "the token id bool True"),
        (_reply(tokens=[-1]), "the token id int -1"),
        (_reply(tokens=[2**40]), "the token id int 1099511627776"),
        (_reply(tokens="5"), "'output_ids' is str '5' instead of a list"),
        (_reply(tokens=[]), "0 tokens instead of 1 to 1"),
        (_reply(logprob=0.5), "'logprob' is float 0.5, which is out of range"),
        (_reply(logprob=-1e300), "'logprob' is float -1e\\+300, which is out of range"),
        (_reply(logprob=None), "'logprob' is NoneType None instead of a number"),
        (_reply(logprob="-1"), "'logprob' is str '-1' instead of a number"),
        (_reply(output_token_logprobs=[5]), "entries that are not"),
        (_reply(finish_reason=None), "'finish_reason' is NoneType None"),
        (_reply(finish_reason={"type": ["stop"]}), "'type' is list"),
        (_reply(weight_versions=[{"version": "0", "start": 1, "end": 0}]), "the span dict"),
        (_reply(weight_versions=[{"version": "0", "start": 0, "end": 10**9}]), "'end' is int 1000000000"),
        (_reply(weight_versions=7), "'weight_versions' is int 7 instead of a list"),
        ((200, "[" * 5000), "nested deeper than"),
        ((200, '[{"meta_info": ' + "9" * 5000 + "}]"), "more than 4300 digits"),
        ((200, '{"a": 1, "a": 2}'), "the key 'a' twice"),
        ((400, {"error": {"message": "longer than the context"}}), "status 400: .*longer than the context"),
    ],
)
def test_malformed_reply(fake: FakeServer, reply: tuple[int, Any], expected: str) -> None:
    fake.answer = lambda body: reply
    with pytest.raises(UserError, match=expected) as caught:
        _generate([fake.url])
    assert "\n" not in str(caught.value)


def test_sampling_parameters() -> None:
    plain = sampling_parameters(SamplingSettings(samples=2, max_tokens=9, temperature=0.7, top_p=0.9), seed=2**63 + 5)
    assert plain["ignore_eos"] is True and "stop_token_ids" not in plain
    assert (plain["temperature"], plain["top_p"], plain["top_k"], plain["max_new_tokens"]) == (0.7, 0.9, -1, 9)
    assert plain["sampling_seed"] == 5
    stopping = sampling_parameters(SamplingSettings(samples=2, max_tokens=9, top_k=3, stop_token_ids=(1, 2)), seed=0)
    assert stopping["stop_token_ids"] == [1, 2] and "ignore_eos" not in stopping and stopping["top_k"] == 3


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        ("HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n", "a reply of more than"),
        ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nfffffffffff\r\n", "a reply of more than"),
        ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + "8000000\r\n" * 2, "a reply of more than"),
        ("HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 3\r\n\r\nabc", "the encoding 'gzip'"),
        ("HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n", "ValueError"),
        ("HTTP/1.1 abc OK\r\nContent-Length: 0\r\n\r\n", "ValueError"),
        ("HTTP/1.1 200 OK\r\n" + "x: y\r\n" * 20_000 + "\r\n", "not an HTTP reply"),
        ("SSH-2.0-OpenSSH\r\n\r\n", "not an HTTP reply"),
        ("HTTP/1.1 200\r\n\r\n", ""),
    ],
)
def test_replies_that_are_not_read(head: str, expected: str) -> None:
    """A server that announces or sends too much, or something else, is lost; nothing of it is kept in memory."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(head.encode())
        await writer.drain()
        writer.close()

    async def ask() -> str:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        connections = Connections(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        try:
            return str((await connections.request("GET", "/", 60)).status)
        except ConnectionLostError as error:
            return str(error)
        finally:
            connections.close()
            server.close()

    said = asyncio.run(ask())
    assert expected in said and "\n" not in said and (expected or said == "200")


def test_the_limit_of_a_reply_leaves_room_for_its_tokens() -> None:
    sampling = SamplingSettings(samples=16, max_tokens=32768)
    entry = [-math.pi * 1e-5, 151935, None]
    assert largest_reply(sampling) > 16 * 32768 * (len(json.dumps(entry)) + len("151935, ") + 2)
