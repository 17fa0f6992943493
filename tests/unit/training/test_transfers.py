"""Bytes that cross to the device for a microbatch: those of the microbatch, however large the rollout is."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from megatron_rlvr.control import AffineThreshold, ClipThresholds
from megatron_rlvr.data.batch import RolloutBatch
from megatron_rlvr.data.completion import Completion
from megatron_rlvr.data.microbatch import MicrobatchConfig, build_microbatch
from megatron_rlvr.objectives import UpdateObjective, build_objective
from megatron_rlvr.ops import TokenStatistics
from megatron_rlvr.training.head import Head, TokenScores
from megatron_rlvr.training.loss import MinibatchLoss

RESPONSE = 7


class CountedTransfers(TorchFunctionMode):
    """Counts the bytes of every tensor that is moved, or that would be on a GPU: all code says so with `Tensor.to`."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.Tensor.to, torch.Tensor.cuda, torch.Tensor.copy_):
            self.bytes += args[0].nbytes
        return func(*args, **(kwargs or {}))


def rollout(sequences: int) -> RolloutBatch:
    completions = [Completion(list(range(1, RESPONSE + 1)), [-1.0] * RESPONSE, "stop", 0) for _ in range(sequences)]
    return RolloutBatch.from_completions([[3, 4]] * (sequences // 2), completions, [1.0] * sequences, padding=0)


def moved(sequences: int, *, steered: bool, scoring: bool) -> int:
    """Bytes that the loss or the scoring of a microbatch of two sequences moves, out of a rollout of `sequences`."""
    batch = rollout(sequences)
    microbatch = build_microbatch(batch, torch.tensor([0, 1]), MicrobatchConfig(sequences=2))
    tokens = 2 * RESPONSE
    values = torch.linspace(-2, -1, tokens)
    statistics = TokenStatistics(values, -values, values.exp(), values)
    head: Any = SimpleNamespace(fused=False, statistics=lambda *_args, **_named: statistics)
    scores = TokenScores.zeros(batch.token_count)
    advantage = torch.ones(sequences)
    wide = AffineThreshold(0.2, 0.0)
    objective = UpdateObjective(build_objective("clip"), ClipThresholds(wide, wide, 0.5 if steered else 0.0))
    assert objective.is_steered is steered
    loss = MinibatchLoss(head, batch, advantage, torch.ones(sequences), scores, objective, 1.0)
    with CountedTransfers() as counted:
        if scoring:
            Head.score(head, values, microbatch, advantage, scores)
        else:
            loss(values, microbatch)
    return counted.bytes


@pytest.mark.parametrize("scoring", [False, True], ids=["update", "score"])
@pytest.mark.parametrize("steered", [False, True], ids=["plain", "steered"])
def test_only_the_microbatch_is_moved(steered: bool, scoring: bool) -> None:
    small, large = (moved(sequences, steered=steered, scoring=scoring) for sequences in (2, 512))
    assert small == large
    assert 0 < large <= 48 * 2 * RESPONSE  # six arrays of at most 8 bytes per token
