"""Server arguments: spelling, command line, and the GPUs that they spread a server over."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_rlvr.errors import UserError
from megatron_rlvr.rollout.engines.sglang.config import SGLangConfig
from megatron_rlvr.rollout.engines.sglang.launch_arguments import ServerLayout, command_line, normalized


def test_arguments_become_a_command_line() -> None:
    arguments = {"tensor_parallel_size": 2, "enable_metrics": True, "disable_radix_cache": False, "revision": None}
    assert command_line(arguments) == ["--tensor-parallel-size", "2", "--enable-metrics"]
    assert command_line({"json_model_override_args": {"a": 1}}) == ["--json-model-override-args", '{"a": 1}']
    assert command_line({"lora-paths": ["a", "b"]}) == ["--lora-paths", "a", "b"]
    # A flag that SGLang sets by default is switched off by another one.
    switches = {"enable-fused-qk-norm-rope": False, "lora_strict_loading": True}
    assert command_line(switches) == ["--no-enable-fused-qk-norm-rope", "--lora-strict-loading"]


def test_hyphens_and_underscores_name_the_same_argument() -> None:
    assert normalized({"tp-size": 2, "mem_fraction_static": 0.5}) == {"tp_size": 2, "mem_fraction_static": 0.5}


@pytest.mark.parametrize(
    ("arguments", "layout", "gpus", "gpus_per_replica"),
    [
        ({}, ServerLayout(), 1, 1),
        ({"tp": 2}, ServerLayout(tensor=2), 2, 2),
        ({"tp-size": 4}, ServerLayout(tensor=4), 4, 4),
        ({"tensor-parallel-size": 8}, ServerLayout(tensor=8), 8, 8),
        ({"tensor_parallel_size": None, "tp_size": "2"}, ServerLayout(tensor=2), 2, 2),
        ({"tensor-parallel-size": 2, "pp_size": 2}, ServerLayout(tensor=2, pipeline=2), 4, 4),
        ({"tp": 2, "pipeline-parallel-size": 4}, ServerLayout(tensor=2, pipeline=4), 8, 8),
        ({"tp_size": 2, "dp": 2}, ServerLayout(tensor=2, replicas=2), 4, 2),
        ({"data-parallel-size": 4}, ServerLayout(replicas=4), 4, 1),
        ({"tp_size": 2, "pp": 2, "dp_size": 2}, ServerLayout(2, 2, 2), 8, 4),
        ({"tp_size": 4, "dp_size": 4, "enable_dp_attention": True}, ServerLayout(tensor=4, attention_groups=4), 4, 4),
        ({"tp_size": 4, "dp-size": 4, "enable-dp-attention": True}, ServerLayout(tensor=4, attention_groups=4), 4, 4),
        ({"tp_size": 4, "attn-dp-size": 4}, ServerLayout(tensor=4, attention_groups=4), 4, 4),
    ],
)
def test_gpus_of_a_server(arguments: dict[str, Any], layout: ServerLayout, gpus: int, gpus_per_replica: int) -> None:
    """The product of SGLang's three sizes; attention data parallelism shares the tensor-parallel ranks' GPUs."""
    found = ServerLayout.from_arguments(arguments)
    assert (found, found.gpus, found.gpus_per_replica) == (layout, gpus, gpus_per_replica)


@pytest.mark.parametrize("size", ["two", 0, -1, 2.0, True, [2], ""])
def test_a_size_that_is_no_number_of_gpus_is_refused(size: object) -> None:
    with pytest.raises(UserError, match=r"rollout\.sglang\.server\.tp_size=.* is not a number of GPUs"):
        ServerLayout.from_arguments({"tp-size": size})
    assert ServerLayout.from_arguments({"tp-size": False}) == ServerLayout()


def test_a_size_under_two_names_is_refused() -> None:
    with pytest.raises(UserError, match="dp is another name of dp_size, which is set, too"):
        ServerLayout.from_arguments({"dp-size": 2, "dp": 2})


@pytest.mark.parametrize(
    ("argument", "value", "expected"),
    [
        ("mem_fraction_statik", 0.5, "SGLang 0.5.23 has no argument of this name: did you mean mem_fraction_static?"),
        ("mem-fraction", 0.5, "did you mean mem_fraction_static?"),  # the plan would not see it
        ("tensor-paralel-size", 2, "did you mean tensor_parallel_size?"),
        ("zzz", 1, "see `python -m sglang.launch_server --help`"),
        ("", 1, "see `python -m sglang.launch_server --help`"),
        ("disable_radix_cach", False, "did you mean disable_radix_cache?"),
        ("enable_memory_saver", "1", "it must be true or false"),
        ("max_running_requests", 64.5, "it must be a whole number"),
        ("max_running_requests", True, "it must be a whole number"),
        ("mem_fraction_static", "half", "it must be a number"),
        ("mem_fraction_static", [0.5], "it must be a number"),
        ("base_gpu_id", "x", "it must be a whole number"),
        ("attention_backend", "flashinfr", "it must be one of triton, torch_native"),
        ("attention_backend", "flashinfr", "did you mean flashinfer?"),
        ("served_model_name", True, "it must be text"),
        ("cuda_graph_bs_decode", [1, "x"], "it must be a list, each a whole number"),
        ("config", "more.yaml", "would hide arguments in a file"),
        ("ssl_keyfile", "key.pem", "https only"),
    ],
)
def test_arguments_that_sglang_would_refuse_are_refused_first(argument: str, value: object, expected: str) -> None:
    with pytest.raises(UserError) as caught:
        SGLangConfig(server={argument: value}).check()
    message = str(caught.value)
    assert message.startswith(f"rollout.sglang.server.{argument}") and expected in message and "\n" not in message


def test_arguments_that_sglang_takes() -> None:
    SGLangConfig(
        server={
            "tp": 2,
            "mem-fraction-static": "0.5",
            "max_running_requests": None,
            "cuda_graph_bs_decode": [1, 2],
            "json_model_override_args": {"a": 1},
            "attention_backend": "torch_native",
            "trust_remote_code": False,
            "tokenizer_worker_num": 1,
            "no_lora_strict_loading": True,
            "disable_cuda_graph": True,
        }
    ).check()
