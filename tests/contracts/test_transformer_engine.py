"""megatron-core finds in the locked Transformer Engine every name that it needs, with the arguments that it passes."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_rlvr.megatron.fusions import _NEEDED
from tests.contracts.megatron_calls import Call, calls, imported_names, names_behind
from tests.contracts.records import read_record

# Missing, and megatron-core goes on: it splits with torch, and multiplies the router's weight with torch.
REPLACED_BY_TORCH = {
    "transformer_engine.pytorch.attention._SplitAlongDim",
    "transformer_engine.pytorch.module.base.get_workspace",
}


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    return read_record("transformer_engine")


def unknown_keywords(call: Call, record: dict[str, Any]) -> set[str]:
    """Keywords of a call that the recorded callable does not take."""
    found = record[call.name]
    parameters = found.get("parameters") if call.method is None else found["methods"].get(call.method)
    if parameters is None or any(name.startswith("**") for name in parameters):
        return set()
    return set(call.keywords) - set(parameters)


def test_every_name_is_recorded_and_none_that_is_needed_is_missing(record: dict[str, Any]) -> None:
    names = imported_names()
    assert len(names) > 40
    assert set(names) <= set(record), "run tools/record_contracts.py"
    assert {name for name in names if record[name] is None} == REPLACED_BY_TORCH
    assert all(names[name] for name in REPLACED_BY_TORCH), "megatron-core does not go on without them"


def test_every_call_passes_arguments_that_exist(record: dict[str, Any]) -> None:
    made = [call for call in calls() if call.name not in REPLACED_BY_TORCH and record[call.name] is not None]
    assert {"Linear", "LayerNormLinear", "GroupedLinear", "DotProductAttention"} <= {
        call.name.rpartition(".")[2] for call in made
    }
    wrong = {f"{c.name}.{c.method}": unknown_keywords(c, record) for c in made if unknown_keywords(c, record)}
    # The function that makes this call needs get_workspace, so megatron-core does not define it.
    assert set(wrong) <= {"transformer_engine.pytorch.cpp_extensions.general_gemm.None"}, wrong


@pytest.mark.parametrize("function", [name for _, functions in _NEEDED.values() for name in functions])
def test_the_fusions_of_the_configuration_are_there(record: dict[str, Any], function: str) -> None:
    names = names_behind(function)
    assert names, f"megatron-core's {function} comes from elsewhere"
    assert {name for name in names if record[name] is None} == set()


def test_a_change_would_be_seen(record: dict[str, Any]) -> None:
    name = "transformer_engine.pytorch.DotProductAttention"
    call = next(call for call in calls() if call.name == name and call.method == "__init__")
    methods = dict(record[name]["methods"])
    methods["__init__"] = [parameter for parameter in methods["__init__"] if parameter != "cp_comm_type"]
    assert unknown_keywords(call, {**record, name: {"methods": methods}}) == {"cp_comm_type"}
