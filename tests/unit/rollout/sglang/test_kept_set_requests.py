"""Kept sets from SGLang: what is asked for, what replies must hold, and servers that cannot return them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_sglang import FakeServer, fake_server

from megatron_rlvr.errors import UserError
from megatron_rlvr.rollout.config import RolloutConfig
from megatron_rlvr.rollout.engines.sglang.config import SGLangConfig
from megatron_rlvr.rollout.engines.sglang.endpoint import Endpoint
from megatron_rlvr.rollout.engines.sglang.http import Reply
from megatron_rlvr.rollout.engines.sglang.kept_sets import check_server, requested_top_k, with_kept_sets
from megatron_rlvr.rollout.engines.sglang.protocol import generate_body, largest_reply, read_completions
from megatron_rlvr.rollout.sampling import SamplingSettings
from megatron_rlvr.train import main

SAMPLING = SamplingSettings(samples=1, max_tokens=3, top_p=0.8, top_k=50, returns_kept=True)
META: dict[str, Any] = {
    "finish_reason": {"type": "length"},
    "weight_version": "0",
    "output_token_logprobs": [[-2.0, 5, None], [-3.0, 7, None]],
    "output_token_sampling_mask": [[5, 9], [1, 7, 3]],
    "output_token_sampling_logprobs": [-0.5, -0.75],
}


def _reply(**changes: Any) -> Reply:
    """A recorded reply of SGLang 0.5.23, with these entries of its ``meta_info`` changed; None removes one."""
    meta = {name: value for name, value in (META | changes).items() if value is not None}
    return Reply(200, json.dumps([{"output_ids": [5, 7], "meta_info": meta}]).encode())


def test_a_request_asks_for_kept_sets_only_if_training_needs_them() -> None:
    body = json.loads(generate_body([1], SAMPLING, [3]))
    assert body["return_sampling_mask"] is True and body["sampling_params"][0]["top_k"] == 50
    assert "return_sampling_mask" not in json.loads(generate_body([1], SamplingSettings(1, 3, top_p=0.8), [3]))
    assert [requested_top_k(*pair) for pair in ((0, 100), (7, 100), (500, 100))] == [100, 7, 100]


def test_a_completion_has_the_kept_sets_and_their_logprobs() -> None:
    completions = read_completions("http://server", _reply(), SAMPLING)
    assert completions is not None and completions[0].kept is not None
    assert completions[0].kept.sets() == [[5, 9], [1, 7, 3]] and completions[0].logprobs == [-0.5, -0.75]
    plain = read_completions("http://server", _reply(), SamplingSettings(samples=1, max_tokens=3))
    assert plain is not None and plain[0].kept is None and plain[0].logprobs == [-2.0, -3.0]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"output_token_sampling_mask": None}, "no 'output_token_sampling_mask', the tokens that rollout.top_p"),
        ({"output_token_sampling_logprobs": None}, "'logprobs' is NoneType"),
        ({"output_token_sampling_mask": [[5, 9]]}, "2 tokens with 1 kept sets"),
        ({"output_token_sampling_mask": [[5, 9], [1, 3]]}, "token 1, 7, is not in its kept set"),
        ({"output_token_sampling_mask": [[5, 9], []]}, "the kept set of token 1 is not a list"),
        ({"output_token_sampling_mask": [[5, 5], [7]]}, "an id twice"),
        ({"output_token_sampling_logprobs": [-0.5]}, "log-probs of 1"),
        ({"output_token_sampling_logprobs": [-0.5, "x"]}, "'logprob' is str 'x'"),
    ],
)
def test_malformed_kept_sets(changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError, match=expected) as caught:
        read_completions("http://server", _reply(**changes), SAMPLING)
    assert "\n" not in str(caught.value)


def test_the_limit_of_a_reply_leaves_room_for_kept_sets() -> None:
    sampling = SamplingSettings(samples=16, max_tokens=1000, top_k=512, returns_kept=True)
    assert largest_reply(sampling) > 16 * 1000 * (512 * len("151935, ") + 200)


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    with fake_server() as server:
        yield server


@pytest.mark.parametrize(
    ("info", "expected"),
    [
        ({"tp_size": 1}, "cannot return the tokens that rollout.top_p and rollout.top_k keep: its /server_info has no"),
        ({"sampling_mask_max_tokens": 49}, "needs? sets of up to 50 tokens: start the server with --sampling-mask-max"),
        ({"sampling_mask_max_tokens": 50}, None),
    ],
)
def test_a_server_that_cannot_return_them(fake: FakeServer, info: dict[str, Any], expected: str | None) -> None:
    fake.control = lambda path, body: (200, info) if path == "/server_info" else (404, {})
    check = check_server(Endpoint(fake.url, SGLangConfig()), 50)
    if expected is None:
        asyncio.run(check)
    else:
        with pytest.raises(UserError, match=expected) as caught:
            asyncio.run(check)
        assert "\n" not in str(caught.value)


def test_servers_start_with_room_for_the_sets(small_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert with_kept_sets(RolloutConfig(), small_model).server == {}
    limits = [
        with_kept_sets(RolloutConfig(**cut), small_model).server["sampling_mask_max_tokens"]
        for cut in ({"top_p": 0.9}, {"top_k": 5}, {"top_k": 5000})
    ]
    assert limits == [4096, 4096, 4096]  # the small model's vocabulary is smaller
    given = SGLangConfig(server={"sampling-mask-max-tokens": 3})
    assert with_kept_sets(RolloutConfig(top_k=3, sglang=given), small_model) is given
    with pytest.raises(UserError, match=r"rollout\.sglang\.server has sampling_mask_max_tokens=3, but"):
        with_kept_sets(RolloutConfig(top_p=0.9, sglang=given), small_model)
    assert capsys.readouterr().err == ""


def test_a_run_on_an_old_server_ends_in_one_line(
    fake: FakeServer, run_yaml: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.control = lambda path, body: (200, {"tp_size": 1}) if path == "/server_info" else (404, {})
    settings = ["rollout.engine=sglang", f"rollout.sglang.urls=[{fake.url}]", "rollout.top_p=0.9"]
    assert main([str(run_yaml), *settings]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "sampling_mask_max_tokens" in errors[0]
