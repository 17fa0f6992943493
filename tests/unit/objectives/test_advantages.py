"""Advantages compared with plain Python, one group at a time."""

import statistics

import pytest
import torch

from megatron_rlvr.objectives import group_advantages, informative_groups, overlong_penalty

REWARDS = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.1, 0.1, 0.1, 0.1], [0.3, -1.0, 2.0, 0.5]], dtype=torch.float64)


@pytest.mark.parametrize("method", ["grpo", "grpo-no-std", "rloo"])
def test_each_method_is_its_formula(method):
    got = group_advantages(REWARDS, method)
    for group, row in zip(REWARDS.tolist(), got.tolist(), strict=True):
        mean = statistics.fmean(group)
        for i, reward in enumerate(group):
            if method == "grpo":
                expected = (reward - mean) / (statistics.stdev(group) + 1e-6)
            elif method == "grpo-no-std":
                expected = reward - mean
            else:
                expected = reward - statistics.fmean(group[:i] + group[i + 1 :])
            assert row[i] == pytest.approx(expected, abs=1e-9)


def test_a_group_of_equal_rewards_gets_exactly_zero():
    # In float32 the mean of sixteen 0.1 is not 0.1. Divided by a tiny standard deviation, the rounding error
    # would become an advantage.
    rewards = torch.full((1, 16), 0.1)
    assert torch.count_nonzero(rewards - rewards.mean()) > 0
    for method in ("grpo", "grpo-no-std", "rloo"):
        assert torch.count_nonzero(group_advantages(rewards, method)) == 0
    assert informative_groups(REWARDS).tolist() == [True, False, True]


def test_bad_requests_are_refused():
    with pytest.raises(ValueError, match="valid: grpo, grpo-no-std, rloo"):
        group_advantages(REWARDS, "gae")
    with pytest.raises(ValueError, match=r"\[3, 1\]"):
        group_advantages(REWARDS[:, :1])
    with pytest.raises(ValueError, match=r"\[4\]"):
        group_advantages(REWARDS[0])


def test_overlong_penalty_is_zero_then_falls_to_minus_one():
    assert overlong_penalty(torch.tensor([0, 80, 90, 100, 120]), 100, 20).tolist() == [0.0, 0.0, -0.5, -1.0, -1.0]
    with pytest.raises(ValueError, match="buffer_tokens"):
        overlong_penalty(torch.tensor([1]), 10, 10)
