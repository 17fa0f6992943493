"""The locked SGLang takes every argument, request and tag that this project sends."""

from __future__ import annotations

import json
from typing import Any

import pytest

from megatron_rlvr.data.routes import RouterShape
from megatron_rlvr.rollout.engines.sglang.kept_sets import ARGUMENT
from megatron_rlvr.rollout.engines.sglang.protocol import generate_body
from megatron_rlvr.rollout.engines.sglang.server import ROUTES_ARGUMENT, without_expandable_segments
from megatron_rlvr.rollout.engines.sglang.server_arguments import RECORDED
from megatron_rlvr.rollout.sampling import SamplingSettings
from tests.contracts.our_requests import bodies, endpoints, memory_tags, server_arguments
from tests.contracts.records import read_record
from tests.processes import ROOT


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    recorded = json.loads(RECORDED.read_text())
    record = read_record("sglang")
    assert recorded["version"] == record["version"]
    return {**record, "arguments": recorded["arguments"]}


def refused(record: dict[str, Any]) -> list[str]:
    """Each thing that the client sends and the recorded server does not take."""
    found = [f"endpoint {path}" for path in endpoints() if path not in record["endpoints"]]
    for path, keys in bodies().items():
        request = record["endpoints"].get(path)
        known = record["requests"].get(request, []) if request else []
        found += [f"{path}: {key}" for key in sorted(keys - set(known))]
    found += [
        f"--{name}"
        for name in sorted(server_arguments() | {ARGUMENT, ROUTES_ARGUMENT})
        if name not in record["arguments"]
    ]
    return found + [f"tag {tag}" for tag in sorted(memory_tags() - set(record["memory_tags"]))]


def test_the_server_takes_what_the_client_sends(record: dict[str, Any]) -> None:
    assert refused(record) == []
    sent = bodies()
    # The scan of the client's source finds what it should.
    assert len(endpoints()) >= 15 and len(server_arguments()) >= 15 and len(memory_tags()) == 3
    assert {"master_address", "rank_offset", "backend"} <= sent["/init_weights_update_group"]
    assert {"serialized_named_tensors", "load_format", "flush_cache"} <= sent["/update_weights_from_tensor"]


@pytest.mark.parametrize("stop", [(), (7,)])
def test_the_server_takes_a_request_for_completions(record: dict[str, Any], stop: tuple[int, ...]) -> None:
    settings = {"samples": 2, "max_tokens": 8, "temperature": 1.0, "top_p": 0.9, "top_k": 5, "stop_token_ids": stop}
    routers = RouterShape(layers=2, routed=(0, 1), experts=4, chosen=2)
    sampling = SamplingSettings(**settings, returns_kept=True, routers=routers)  # type: ignore[arg-type]
    body = json.loads(generate_body([1, 2], sampling, [3, 4]))
    assert set(body) <= set(record["requests"]["GenerateReqInput"])
    assert {"return_sampling_mask", "return_routed_experts"} <= set(body)
    for parameters in body["sampling_params"]:
        assert set(parameters) <= set(record["requests"]["SamplingParams"])


@pytest.mark.parametrize(
    ("section", "gone", "message"),
    [
        ("arguments", "mem_fraction_static", "--mem_fraction_static"),
        ("endpoints", "/begin_weight_update", "endpoint /begin_weight_update"),
        ("memory_tags", "cuda_graph", "tag cuda_graph"),
    ],
)
def test_a_change_would_be_seen(record: dict[str, Any], section: str, gone: str, message: str) -> None:
    held = record[section]
    without = {k: v for k, v in held.items() if k != gone} if isinstance(held, dict) else [k for k in held if k != gone]
    assert message in refused({**record, section: without})


def test_a_renamed_field_would_be_seen(record: dict[str, Any]) -> None:
    requests = {**record["requests"], "UpdateWeightsFromTensorReqInput": ["tensors", "load_format"]}
    assert "/update_weights_from_tensor: serialized_named_tensors" in refused({**record, "requests": requests})


def test_the_memory_saver_has_what_sglang_calls(record: dict[str, Any]) -> None:
    saver = read_record("torch_memory_saver")
    offered = set(saver["methods"]) | set(saver["functions"])
    assert set(record["torch_memory_saver_calls"]) <= offered
    assert {"pause", "resume", "region"} <= set(record["torch_memory_saver_calls"])
    assert all("tag" in saver["methods"][name] for name in ("pause", "resume", "region"))


def test_servers_start_without_what_the_memory_saver_refuses() -> None:
    (refusal,) = read_record("torch_memory_saver")["refuses"]
    environment = {"PYTORCH_CUDA_ALLOC_CONF": f"{refusal}:True,max_split_size_mb:512"}
    without_expandable_segments(environment)
    assert refusal not in str(environment)


def test_what_the_page_on_sglang_says_of_deterministic_servers_and_deltas(record: dict[str, Any]) -> None:
    assert "enable_deterministic_inference" in record["arguments"]
    assert "sampling_seed" in record["requests"]["SamplingParams"]  # a seed per sample
    page = (ROOT / "docs" / "sglang.md").read_text()
    backends = record["deterministic_attention"]
    assert "torch_native" not in backends and all(f"`{name}`" in page for name in backends)
    # Deltas cannot be applied by the servers in `distributed`: received weights are loaded by the model alone.
    assert record["custom_weight_loaders"] == ["update_weights_from_tensor"]
