"""Server arguments: spelling, command line, and the GPUs that they spread a server over."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_rlvr.errors import UserError
from megatron_rlvr.rollout.engines.sglang.launch_arguments import ServerLayout, command_line, normalized


def test_arguments_become_a_command_line() -> None:
    arguments = {"tensor_parallel_size": 2, "enable_metrics": True, "disable_radix_cache": False, "revision": None}
    assert command_line(arguments) == ["--tensor-parallel-size", "2", "--enable-metrics"]
    assert command_line({"json_model_override_args": {"a": 1}}) == ["--json-model-override-args", '{"a": 1}']
    assert command_line({"lora-paths": ["a", "b"]}) == ["--lora-paths", "a", "b"]


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
        ({"tp_size": 4, "attn-dp-size": 4}, ServerLayout(tensor=4), 4, 4),
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
