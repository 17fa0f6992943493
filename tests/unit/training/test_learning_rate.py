"""The learning rate over the steps of a run."""

from __future__ import annotations

import itertools

import pytest

from megatron_rlvr.megatron.config import OptimizerConfig
from megatron_rlvr.training.learning_rate import learning_rate


def test_learning_rate_warms_up_and_stays() -> None:
    config = OptimizerConfig(learning_rate=1e-3, warmup_steps=4)
    rates = [learning_rate(config, step, 10) for step in range(10)]
    assert rates == pytest.approx([2.5e-4, 5e-4, 7.5e-4, *[1e-3] * 7])


def test_learning_rate_decays_to_its_minimum() -> None:
    config = OptimizerConfig(learning_rate=1e-3, min_learning_rate=1e-4)
    rates = [learning_rate(config, step, 11) for step in range(11)]
    assert rates[0] == pytest.approx(1e-3) and rates[5] == pytest.approx(5.5e-4) and rates[10] == pytest.approx(1e-4)
    assert all(a > b for a, b in itertools.pairwise(rates))
