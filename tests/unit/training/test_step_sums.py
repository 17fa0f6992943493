"""Aggregation weights of the job's tokens, and the metrics of a step's updates, from the sums of every rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_rlvr.megatron import collectives
from megatron_rlvr.training import token_weights as token_weights_module
from megatron_rlvr.training.config import AlgorithmConfig
from megatron_rlvr.training.loss import LOSS_SUMS
from megatron_rlvr.training.policy import UpdateReport
from megatron_rlvr.training.update_metrics import update_metrics

RANKS = 3


@pytest.fixture(autouse=True)
def equal_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A job of RANKS processes that all hold what this one holds."""

    def sum_over_job(values: dict[str, float], contributes: bool = True) -> dict[str, float]:
        assert contributes
        return {name: RANKS * value for name, value in values.items()}

    monkeypatch.setattr(collectives, "sum_over_job", sum_over_job)
    monkeypatch.setattr(collectives, "max_over_job", lambda values: values)


@pytest.mark.parametrize("aggregation", ["token-mean", "sequence-mean", "constant"])
def test_the_weights_of_a_minibatch_are_a_mean_over_the_whole_job(aggregation: Any) -> None:
    lengths = torch.tensor([1, 4, 2, 3])

    class Batch:
        response_lengths = lengths

        def minibatches(self, count: int) -> list[torch.Tensor]:
            return list(torch.arange(4).chunk(count))

    layout: Any = type("Layout", (), {"is_leader": True, "data_size": RANKS})()
    batch: Any = Batch()
    weight = token_weights_module.token_weights(
        batch, AlgorithmConfig(aggregation=aggregation, minibatches=2), 5, layout
    )
    for members in (slice(0, 2), slice(2, 4)):
        total = RANKS * float((weight[members] * lengths[members]).sum())
        expected = float(lengths[members].sum()) / (5 * 2) if aggregation == "constant" else 1.0
        assert total == pytest.approx(expected)


def test_entropy_change_is_that_of_the_last_epoch_and_clip_fractions_those_of_all() -> None:
    def update(**sums: float) -> UpdateReport:
        values = torch.tensor([sums.get(name, 0.0) for name in LOSS_SUMS], dtype=torch.float64)
        return UpdateReport(values, torch.tensor(1.0 + sums["loss"]), 2.0 * sums["loss"], True, 0.0, 0.0)

    updates = [
        update(loss=0.1, active_tokens=10, clipped_high=1, entropy_drift=-5.0, E1=4),
        update(loss=0.2, active_tokens=10, clipped_low=2, entropy_drift=-5.0),
        update(loss=0.3, active_tokens=10, clipped_high=3, entropy_drift=1.0),
        update(loss=0.4, active_tokens=10, entropy_drift=2.0, E4=8),
    ]
    metrics = update_metrics(updates, 2, torch.tensor(True), is_reporting_rank=True)
    assert metrics["entropy_change/measured"] == pytest.approx(3 / 20)
    assert metrics["clip/fraction_high"] == pytest.approx(4 / 40)
    assert metrics["clip/fraction_low"] == pytest.approx(2 / 40)
    assert metrics["region/E1"] == pytest.approx(4 / 40) and metrics["region/E4"] == pytest.approx(8 / 40)
    assert metrics["grad_norm"] == pytest.approx(0.5)
    assert metrics["ratio_max"] == pytest.approx(1.4)
    assert metrics["loss"] == pytest.approx(RANKS * 1.0 / 4)
    assert metrics["skipped_updates"] == 0
