"""Routes as engines report them, and the routes of a microbatch."""

from __future__ import annotations

import base64
import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from megatron_rlvr.checked_input import InvalidInputError
from megatron_rlvr.data.batch import RolloutBatch
from megatron_rlvr.data.completion import Completion
from megatron_rlvr.data.microbatch import MicrobatchConfig, build_microbatch
from megatron_rlvr.data.routes import RouterShape, Routes, decoded_routes

PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8]]
RESPONSES = [[10], [11, 12, 13], [14, 15], [16, 17, 18, 19]]
# Three layers; the first one is dense.
SHAPE = RouterShape(layers=3, routed=(1, 2), experts=5, chosen=2)
OF_SERVER = np.array([[[0, 0], [1, 4], [0, 3]], [[0, 0], [2, 1], [4, 0]]], "<i4")


def report(array: Any = OF_SERVER, dtype: str = "<i4") -> str:
    return base64.b64encode(np.asarray(array, dtype).tobytes()).decode()


def test_a_report_becomes_compact_routes() -> None:
    routes = decoded_routes(report(), 2, SHAPE, of_server=True)
    assert routes.experts.tolist() == OF_SERVER[:, 1:].tolist() and routes.experts.dtype == np.uint8
    assert decoded_routes(routes.encoded(), 2, SHAPE, of_server=False) == routes
    # A recording may say that the routes of a sequence are not known.
    assert decoded_routes("", 2, SHAPE, of_server=False).experts.shape == (0, 2, 2)


@pytest.mark.parametrize(("experts", "dtype"), [(256, np.uint8), (257, np.int16), (384, np.int16)])
def test_the_largest_expert_survives(experts: int, dtype: type) -> None:
    shape = RouterShape(1, (0,), experts, chosen=2)
    routes = decoded_routes(report([[[experts - 1, 0]]]), 1, shape, of_server=True)
    assert routes.experts.tolist() == [[[experts - 1, 0]]] and routes.experts.dtype == dtype
    assert decoded_routes(routes.encoded(), 1, shape, of_server=False) == routes
    with pytest.raises(InvalidInputError, match=f"a route to expert {experts} of a model with {experts}"):
        decoded_routes(report([[[experts, 0]]]), 1, shape, of_server=True)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (report(OF_SERVER[:1]), "24 bytes of routes instead of 48: 2 tokens x 3 layers x 2 experts x 4 bytes"),
        (report([*OF_SERVER, OF_SERVER[0]]), "72 bytes of routes instead of 48"),
        (report(OF_SERVER[:, 1:]), "32 bytes of routes instead of 48"),
        (report(OF_SERVER, "<i2"), "24 bytes of routes instead of 48"),
        (report()[:-1], "not base64"),
        (report()[:-2] + "\u00e9=", "not base64"),
        ("", "0 bytes of routes instead of 48"),
        (None, "the routes' is NoneType"),
        ([[1]], "the routes' is list"),
        (report(np.where(OF_SERVER == 4, 5, OF_SERVER)), "a route to expert 5 of a model with 5"),
        (report(np.where(OF_SERVER == 4, -1, OF_SERVER)), "a route to expert -1 of a model with 5"),
        (report(np.where(OF_SERVER == 4, 2**30, OF_SERVER)), "a route to expert 1073741824 of a model with 5"),
        (report(np.where(OF_SERVER == 4, 0, OF_SERVER)), r"routes of token 1 in layer 2 that name an expert twice"),
        (report(np.zeros_like(OF_SERVER)), r"routes of token 0 in layer 1 that name an expert twice: \[0, 0\]"),
    ],
)
def test_malformed_reports(text: Any, expected: str) -> None:
    with pytest.raises(InvalidInputError, match=expected) as caught:
        decoded_routes(text, 2, SHAPE, of_server=True)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def route(sequence: int, position: int) -> list[list[int]]:
    """The route of a token, different for each."""
    return [[(5 * sequence + position) % 40, 40 + position], [80 + sequence, 90 + position]]


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize(
    "config",
    [
        MicrobatchConfig(width_multiple=2),
        MicrobatchConfig(tokens=40, width_multiple=2),
        MicrobatchConfig(context_size=2, context_rank=1, width_multiple=2),
        MicrobatchConfig(context_size=2, tokens=40, width_multiple=2),
    ],
    ids=["padded", "packed", "context", "context-packed"],
)
def test_routes_follow_their_tokens(config: MicrobatchConfig, tensor: int) -> None:
    lengths = [len(PROMPTS[i // 2]) + len(r) for i, r in enumerate(RESPONSES)]
    known = [length - 1 if i != 1 else 0 for i, length in enumerate(lengths)]
    completions = [
        Completion(r, [-1.0] * len(r), "stop", 0, routes=Routes(np.array([route(i, p) for p in range(n)], np.uint8)))
        if n
        else Completion(r, [-1.0] * len(r), "stop", 0, routes=Routes(np.zeros((0, 2, 2), np.uint8)))
        for i, (r, n) in enumerate(zip(RESPONSES, known, strict=True))
    ]
    batch = RolloutBatch.from_completions(PROMPTS, completions, [0.0, 1.0, 0.0, 1.0], padding=99)
    for chosen in ([3, 0, 1], [2], []):
        microbatch = build_microbatch(batch, torch.tensor(chosen, dtype=torch.int64), config)
        assert microbatch.routes is not None and microbatch.routes.rows.shape == microbatch.tokens.shape
        shares = [microbatch.routes.select(slice(1, 2), share, tensor) for share in range(tensor)]
        experts = torch.cat([experts for experts, _ in shares], dim=1)
        replayed = torch.cat([mask for _, mask in shares])
        tokens = microbatch.tokens.t().flatten()
        assert experts.shape == (1, len(tokens), 2) and experts.dtype == torch.uint8
        rows = batch.routes.rows_of(torch.arange(4), 9)  # type: ignore[union-attr]
        for index in replayed.nonzero()[:, 0].tolist():
            (found,) = (
                (sequence, position)
                for sequence in chosen
                for position in range(known[sequence])
                if experts[0, index].tolist() == route(sequence, position)[1]
            )
            assert int(batch.tokens[found]) == int(tokens[index]) and int(rows[found]) >= 0
        ranks = [dataclasses.replace(config, context_rank=rank) for rank in range(config.context_size)]
        parts = [build_microbatch(batch, microbatch.sequences, rank).routes for rank in ranks]
        assert sum(int((part.rows >= 0).sum()) for part in parts if part) == sum(known[i] for i in chosen)
        assert config.context_size > 1 or int(replayed.sum()) == sum(known[i] for i in chosen)


def test_a_stage_keeps_the_routes_of_its_routers() -> None:
    """Stage 1 of an interleaved pipeline: chunks with routers 1 and 3 of 5, and one without."""
    experts = np.arange(2 * 5 * 2, dtype=np.uint8).reshape(2, 5, 2)
    completions = [Completion([10, 11], [-1.0, -1.0], "stop", 0, routes=Routes(experts))] * 2
    batch = RolloutBatch.from_completions([[1]], completions, [0.0, 1.0], 99, routers=[1, 3])
    assert batch.routes is not None and batch.routes.experts.shape == (4, 2, 2)
    routes = build_microbatch(batch, torch.tensor([1]), MicrobatchConfig()).routes
    assert routes is not None
    for number in (1, 3):
        chosen, replayed = routes.select(slice(number, number + 1))
        assert replayed.tolist() == [True, True, False]
        assert chosen[0, :2].tolist() == experts[:, number].tolist()
    assert routes.select(slice(0, 0))[0].shape == (0, 3, 2)


def test_completions_with_and_without_routes_do_not_mix() -> None:
    routes = Routes(np.zeros((1, 2, 2), np.uint8))
    completions = [Completion([10], [-1.0], "stop", 0, routes=routes), Completion([10], [-1.0], "stop", 0)]
    with pytest.raises(ValueError, match="1 of 2 completions have routes"):
        RolloutBatch.from_completions([[1]], completions, [0.0, 1.0], padding=99)
