"""Routes from SGLang: what is asked for, what replies must hold, and servers whose routes would be wrong."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_sglang import FakeServer, fake_server

from megatron_rlvr.data.routes import RouterShape
from megatron_rlvr.errors import UserError
from megatron_rlvr.rollout.config import RolloutConfig
from megatron_rlvr.rollout.engines.sglang.config import SGLangConfig
from megatron_rlvr.rollout.engines.sglang.endpoint import Endpoint
from megatron_rlvr.rollout.engines.sglang.http import Reply
from megatron_rlvr.rollout.engines.sglang.protocol import generate_body, largest_reply, read_completions
from megatron_rlvr.rollout.engines.sglang.routed_experts import ARGUMENT, check_server, with_routed_experts
from megatron_rlvr.rollout.engines.sglang.server import Server
from megatron_rlvr.rollout.sampling import SamplingSettings
from megatron_rlvr.train import main
from tests.small_model import make_small_model

SHAPE = RouterShape(layers=2, routed=(0, 1), experts=4, chosen=2)
SAMPLING = SamplingSettings(samples=1, max_tokens=3, routers=SHAPE)
# Two prompt tokens and the first of two response tokens.
ROUTES = np.array([[[3, 1], [2, 1]], [[0, 2], [0, 3]], [[3, 0], [2, 3]]], np.int32)


def encoded(routes: np.ndarray) -> str:
    return base64.b64encode(routes.tobytes()).decode()


def reply(**changes: Any) -> Reply:
    """A reply of SGLang 0.5.23, with these entries of its ``meta_info`` changed; None removes one."""
    meta = {
        "finish_reason": {"type": "length"},
        "weight_version": "0",
        "num_retractions": 0,
        "output_token_logprobs": [[-2.0, 5, None], [-3.0, 7, None]],
        "routed_experts": encoded(ROUTES),
        **changes,
    }
    content = {"output_ids": [5, 7], "meta_info": {name: value for name, value in meta.items() if value is not None}}
    return Reply(200, json.dumps([content]).encode())


def test_a_request_asks_for_routes_only_if_they_are_replayed() -> None:
    assert json.loads(generate_body([1, 2], SAMPLING, [3]))["return_routed_experts"] is True
    assert "return_routed_experts" not in json.loads(generate_body([1, 2], SamplingSettings(1, 3), [3]))


def test_a_completion_has_routes_of_all_tokens_but_the_last() -> None:
    (completion,) = read_completions("http://server", reply(), SAMPLING, prompt_tokens=2) or []
    assert completion.routes is not None and completion.routes.experts.tolist() == ROUTES.tolist()
    (plain,) = read_completions("http://server", reply(), SamplingSettings(1, 3), prompt_tokens=2) or []
    assert plain.routes is None


def test_routes_of_a_retracted_sequence_are_left_out() -> None:
    (completion,) = read_completions("http://server", reply(num_retractions=1), SAMPLING, prompt_tokens=2) or []
    assert completion.routes is not None and completion.routes.experts.shape == (0, 2, 2)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"routed_experts": None}, "no 'routed_experts', the routes that rollout.routing_replay needs"),
        ({"routed_experts": encoded(ROUTES[:2])}, "32 bytes of routes instead of 48: 3 tokens x 2 layers"),
        ({"routed_experts": encoded(np.concatenate([ROUTES, ROUTES]))}, "96 bytes of routes instead of 48"),
        ({"routed_experts": encoded(ROUTES + 1)}, "a route to expert 4 of a model with 4"),
        ({"routed_experts": encoded(ROUTES * 0)}, "routes of token 0 in layer 0 that name an expert twice"),
        ({"routed_experts": [[1, 2]]}, "list"),
        ({"routed_experts": "%"}, "not base64"),
        ({"num_retractions": None}, "no 'num_retractions'"),
        ({"num_retractions": -1}, "num_retractions"),
    ],
)
def test_malformed_routes(changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError, match=expected) as caught:
        read_completions("http://server", reply(**changes), SAMPLING, prompt_tokens=2)
    assert "\n" not in str(caught.value)


def test_the_limit_of_a_reply_leaves_room_for_routes() -> None:
    shape = RouterShape(layers=48, routed=tuple(range(48)), experts=128, chosen=8)
    sampling = SamplingSettings(samples=16, max_tokens=1000, routers=shape)
    assert largest_reply(sampling, 500) > 16 * len(encoded(np.zeros((1499, 48, 8), np.int32)))


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    with fake_server() as server:
        yield server


@pytest.mark.parametrize(
    ("info", "expected"),
    [
        ({"tp_size": 1}, "cannot return routes for rollout.routing_replay: its /server_info has no"),
        ({ARGUMENT: False}, "returns no routes, .*: start it with --enable-return-routed-experts"),
        ({ARGUMENT: True, "pp_size": 2}, "pipeline_parallel_size=2, with which SGLang returns the routes of some"),
        ({ARGUMENT: True, "enable_hierarchical_cache": True}, "enable_hierarchical_cache=True, which moves keys"),
        ({ARGUMENT: True, "disaggregation_mode": "decode"}, "disaggregation_mode=decode"),
        ({ARGUMENT: True, "pp_size": 1, "tp_size": 8, "disaggregation_mode": "null"}, None),
    ],
)
def test_a_server_that_cannot_return_them(fake: FakeServer, info: dict[str, Any], expected: str | None) -> None:
    fake.control = lambda path, body: (200, info) if path == "/server_info" else (404, {})
    check = check_server(Endpoint(fake.url, SGLangConfig()))
    if expected is None:
        asyncio.run(check)
    else:
        with pytest.raises(UserError, match=expected) as caught:
            asyncio.run(check)
        assert "\n" not in str(caught.value)


def test_servers_start_with_the_recording_of_routes(tmp_path: Path) -> None:
    plain = SGLangConfig(server={"max_total_tokens": 9})
    assert with_routed_experts(RolloutConfig(), plain) is plain
    config = with_routed_experts(RolloutConfig(routing_replay=True), plain)
    assert config.server == {"max_total_tokens": 9, ARGUMENT: True}
    # On a CPU, the server's processes import what lets SGLang record routes there.
    assert (Path(Server(config, "float32", tmp_path / "log").environment["PYTHONPATH"]) / "sitecustomize.py").is_file()
    assert "PYTHONPATH" not in Server(plain, "float32", tmp_path / "log").environment


@pytest.mark.parametrize(
    ("argument", "value", "expected"),
    [
        ("speculative-algorithm", "EAGLE", "speculative_algorithm=EAGLE"),
        ("enable_two_batch_overlap", True, "enable_two_batch_overlap=True"),
        ("enable_lmcache", True, "enable_lmcache=True"),
        ("pp-size", 2, "pipeline_parallel_size=2"),
        ("enable_return_routed_experts", False, "enable_return_routed_experts=false"),
    ],
)
def test_arguments_under_which_routes_would_be_wrong(argument: str, value: object, expected: str) -> None:
    given = SGLangConfig(server={argument: value})
    with pytest.raises(UserError, match=rf"rollout\.sglang\.server has {expected}") as caught:
        with_routed_experts(RolloutConfig(routing_replay=True), given)
    assert "\n" not in str(caught.value)
    assert with_routed_experts(RolloutConfig(), given) is given


@pytest.mark.parametrize("interrupt", ["retract", "in_place", "finish"])
def test_interrupts_that_recompute_routes(interrupt: Any) -> None:
    servers = SGLangConfig(interrupt=interrupt)
    rollout = RolloutConfig(engine="sglang", routing_replay=True, max_staleness=1, sglang=servers)
    if interrupt == "retract":
        with pytest.raises(UserError, match="interrupt=retract recomputes the routes") as caught:
            rollout.check()
        assert "\n" not in str(caught.value)
    else:
        rollout.check()
    RolloutConfig(engine="sglang", routing_replay=True, sglang=servers).check()  # nothing is interrupted


@pytest.mark.parametrize(("tied", "expected"), [(True, "does not tie the output layer"), (False, "returns no routes")])
def test_a_run_that_would_train_on_other_models_or_routes_ends_in_one_line(
    tied: bool, expected: str, fake: FakeServer, run_yaml: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.control = lambda path, body: (200, {ARGUMENT: False}) if path == "/server_info" else (404, {})
    model = make_small_model(tmp_path / "mixture", mixture=True, tied=tied)
    settings = ["rollout.engine=sglang", f"rollout.sglang.urls=[{fake.url}]", "rollout.routing_replay=true"]
    assert main([str(run_yaml), f"model.path={model}", *settings]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and expected in errors[0]
