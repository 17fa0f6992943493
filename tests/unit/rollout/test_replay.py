"""Recorded rollouts, and the engine that replays them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scripted_engine import ScriptedEngine

from megatron_rlvr.data.completion import Completion
from megatron_rlvr.data.kept_tokens import KeptTokens
from megatron_rlvr.data.routes import RouterShape, Routes
from megatron_rlvr.errors import UserError
from megatron_rlvr.rollout.engines.base import GroupRequest
from megatron_rlvr.rollout.engines.replay import ReplayEngine
from megatron_rlvr.rollout.groups import Group
from megatron_rlvr.rollout.recording import record_group, recording_path
from megatron_rlvr.rollout.sampling import SamplingSettings
from megatron_rlvr.verifiers import Verdict

SAMPLING = SamplingSettings(samples=2, max_tokens=6)
RECORDED = {
    (3, slot): [
        Completion([slot, 7], [-0.1, -0.2 / 3], "stop", 3),
        Completion([slot, 8, 9], [-1.0, -2.0, -3.0], "length", 4, ((3, 1), (4, 2))),
    ]
    for slot in (0, 5)
}
CUT = [
    Completion([7, 8], [-0.1, -0.2], "stop", 3, kept=KeptTokens.of([[7, 1], [8]])),
    Completion([9], [-0.3], "stop", 3, kept=KeptTokens.of([[2, 9, 4]])),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for (step, slot), completions in RECORDED.items():
        verdicts = [Verdict(1.0, "ok"), Verdict(0.0, "timeout")]
        record_group(tmp_path, step, Group(slot, 11, completions, verdicts, ["one", "two"]), prompt="1 2 : 3 >")
    return tmp_path


def _request(slot: int, step: int = 3) -> GroupRequest:
    return GroupRequest([1, 2], [10, 11], (step, slot))


def test_a_recorded_group_comes_back_exactly(folder: Path) -> None:
    engine = ReplayEngine(folder, evaluation=None)
    assert engine.generate([_request(5), _request(0)], SAMPLING) == [RECORDED[3, 5], RECORDED[3, 0]]


def test_routes_come_back_exactly(tmp_path: Path) -> None:
    shape = RouterShape(layers=3, routed=(1, 2), experts=9, chosen=2)
    sampling = replace(SAMPLING, routers=shape)
    routes = Routes(np.arange(12, dtype=np.uint8).reshape(3, 2, 2) % 9)
    unknown = Routes(routes.experts[:0])
    completions = [
        Completion([7, 8], [-0.1, -0.2], "stop", 3, routes=routes),
        Completion([9], [-0.3], "stop", 3, routes=unknown),
    ]
    group = Group(0, 11, completions, [Verdict(1.0, "ok"), Verdict(0.0, "ok")], ["one", "two"])
    record_group(tmp_path, 3, group, prompt="1")
    engine = ReplayEngine(tmp_path, evaluation=None)
    assert engine.generate([_request(0)], sampling) == [completions]
    # The same rollout can be trained on without replay.
    assert engine.generate([_request(0)], SAMPLING) == [[replace(c, routes=None) for c in completions]]
    with pytest.raises(UserError, match="12 bytes of routes instead of 16: 4 tokens"):
        engine.generate([GroupRequest([1, 2, 3], [10, 11], (3, 0))], sampling)
    path = recording_path(tmp_path, 3, 0)
    path.write_text(path.read_text().replace(routes.encoded(), ""))
    assert engine.generate([_request(0)], sampling)[0][0].routes == unknown


def test_recordings_without_routes_are_refused(folder: Path) -> None:
    routers = RouterShape(layers=1, routed=(0,), experts=4, chosen=2)
    with pytest.raises(UserError, match=r"was recorded without rollout\.routing_replay") as caught:
        ReplayEngine(folder, evaluation=None).generate([_request(0)], replace(SAMPLING, routers=routers))
    assert "\n" not in str(caught.value)


def test_kept_sets_come_back_exactly(tmp_path: Path) -> None:
    sampling = replace(SAMPLING, returns_kept=True)
    group = Group(0, 11, CUT, [Verdict(1.0, "ok"), Verdict(0.0, "ok")], ["one", "two"])
    record_group(tmp_path, 3, group, prompt="1")
    assert ReplayEngine(tmp_path, evaluation=None).generate([_request(0)], sampling) == [CUT]
    path = recording_path(tmp_path, 3, 0)
    path.write_text(path.read_text().replace("[[7, 1], [8]]", "[[7, 1], [1]]"))
    with pytest.raises(UserError, match=r"is not a recorded rollout \(token 1, 8, is not in its kept set\)"):
        ReplayEngine(tmp_path, evaluation=None).generate([_request(0)], sampling)


def test_a_recording_under_a_cut_is_not_trained_as_the_whole_vocabulary(tmp_path: Path) -> None:
    mixed = [CUT[0], replace(CUT[1], kept=None)]
    for slot, completions in enumerate([CUT, mixed]):
        group = Group(slot, 11, completions, [Verdict(1.0, "ok"), Verdict(0.0, "ok")], ["one", "two"])
        record_group(tmp_path, 3, group, prompt="1")
        with pytest.raises(UserError, match="which are not set here"):
            ReplayEngine(tmp_path, evaluation=None).generate([_request(slot)], SAMPLING)
    with pytest.raises(UserError, match="were recorded without the tokens"):
        ReplayEngine(tmp_path, evaluation=None).generate([_request(1)], replace(SAMPLING, returns_kept=True))


def test_a_recording_of_the_whole_vocabulary_cannot_be_trained_under_a_cut(folder: Path) -> None:
    engine = ReplayEngine(folder, evaluation=None)
    with pytest.raises(UserError, match=r"were recorded without the tokens that rollout.top_p and rollout.top_k keep"):
        engine.generate([_request(0)], replace(SAMPLING, returns_kept=True))


def test_evaluations_are_generated(folder: Path) -> None:
    local = ScriptedEngine(streaming=False)
    engine = ReplayEngine(folder, local)  # type: ignore[arg-type]
    engine.update_weights(4)
    [group] = engine.generate([GroupRequest([1, 2], [10, 11])], SAMPLING)
    assert local.asked == [1] and {completion.weight_version for completion in group} == {4}
    assert engine.generate([_request(0)], SAMPLING) == [RECORDED[3, 0]] and local.asked == [1]


def test_a_missing_group_is_named(folder: Path) -> None:
    engine = ReplayEngine(folder, evaluation=None)
    with pytest.raises(UserError, match=r"no recorded rollout .*step_000004/prompt_00005.jsonl: record a run with"):
        engine.generate([_request(5, step=4)], SAMPLING)
    with pytest.raises(UserError, match=r"holds 2 completions, rollout.samples_per_prompt asks for 3"):
        engine.generate([_request(5)], SamplingSettings(samples=3, max_tokens=6))


@pytest.mark.parametrize(
    ("key", "value", "found"),
    [
        ("token_ids", [5, "7"], "the token id str '7'"),
        ("token_ids", [5], "1 tokens with log-probs of 2"),
        ("token_ids", [5] * 7, "7 tokens instead of 1 to 6"),
        ("token_ids", None, "'token_ids' is NoneType None"),
        ("logprobs", [-0.1, float("nan")], "NaN, which is not a number"),
        ("logprobs", [-0.1, 3.0], "'logprob' is float 3.0, which is out of range"),
        ("finish_reason", "abort", "the finish reason str 'abort'"),
        ("weight_version", "x", "'weight_version' is str 'x'"),
        ("version_spans", [[3, 1]], "weight versions of another number of tokens"),
        ("version_spans", [3], "entries that are not"),
        ("version_spans", [[3, -1], [4, 3]], "'tokens' is int -1"),
    ],
)
def test_a_damaged_recording_is_refused_in_one_line(folder: Path, key: str, value: object, found: str) -> None:
    path = recording_path(folder, 3, 5)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[0][key] = value
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    with pytest.raises(UserError) as error:
        ReplayEngine(folder, evaluation=None).generate([_request(5)], SAMPLING)
    assert f"{path} is not a recorded rollout (" in str(error.value)
    assert found in str(error.value) and "\n" not in str(error.value)
