"""A step's tokens as another trainer hands them to a schedule, compared with the functions that they combine."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from megatron_rlvr import ops
from megatron_rlvr.control import ClipThresholds, SteeringResponse, StepTokens, regions

STEERED = ClipThresholds(steering=0.4)


def step(seed, tokens=60, vocabulary=11):
    generator = torch.Generator().manual_seed(seed)
    logits = 2.0 * torch.randn(tokens, vocabulary, generator=generator)
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    weight = torch.rand(tokens, generator=generator)
    weight[::5] = 0.0
    advantage = torch.randn(tokens, generator=generator)
    advantage[::4] = 0.0
    return ops.token_statistics(logits, targets, second_moments=True), advantage, weight


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_one_call_measures_what_schedules_observe(seed):
    statistics, advantage, weight = step(seed)
    found = StepTokens.measure(statistics, advantage, weight)
    of_policy = (statistics.sum_squared_prob, statistics.sum_squared_prob_logprob)
    change = regions.entropy_change(statistics.logprob, statistics.entropy, advantage, *of_policy)
    ascent = regions.gradient_norm(statistics.logprob, advantage, of_policy[0])
    response = SteeringResponse.from_sums(regions.steering_sums(change, ascent, weight).tolist())
    assert found.response == response
    assert found.mean_entropy == pytest.approx(statistics.entropy[weight > 0].double().mean().item(), rel=1e-12)
    rows = torch.tensor([3, 1, 44])
    expected = regions.steering_weights(change, 0.4, response)[rows]
    torch.testing.assert_close(found.steering_weights(STEERED, rows), expected, rtol=0, atol=0)
    assert found.steering_weights(STEERED).std() > 0
    assert (found.steering_weights(ClipThresholds()) == 1).all()


def test_padding_may_hold_anything_and_tokens_may_have_any_shape():
    statistics, advantage, weight = step(0)
    expected = StepTokens.measure(statistics, advantage, weight)
    padded = {
        name: torch.where(weight == 0, torch.nan, getattr(statistics, name)).view(6, 10)
        for name in ("logprob", "entropy", "sum_squared_prob", "sum_squared_prob_logprob")
    }
    advantage = torch.where(weight == 0, torch.nan, advantage)
    found = StepTokens.measure(SimpleNamespace(**padded), advantage.view(6, 10), weight.view(6, 10))
    assert found.response == expected.response
    assert found.mean_entropy == expected.mean_entropy
    weights = found.steering_weights(STEERED)
    torch.testing.assert_close(weights.flatten(), expected.steering_weights(STEERED))
    entropy = torch.where(weight == 0, torch.nan, 1.1 * statistics.entropy).view(6, 10)
    assert found.entropy_shift(entropy) == pytest.approx(math.log(1.1), rel=1e-5)


def test_the_ranks_of_a_step_add_up_to_one_process():
    statistics, advantage, weight = step(1)
    whole = StepTokens.measure(statistics, advantage, weight)
    halves = [slice(0, 20), slice(20, 60)]
    sums = []

    def rank(rows, all_reduce):
        part = {name: getattr(statistics, name)[rows] for name in vars(statistics)}
        return StepTokens.measure(SimpleNamespace(**part), advantage[rows], weight[rows], all_reduce=all_reduce)

    for rows in halves:
        rank(rows, lambda each: sums.append(each.clone()))
    total = torch.stack(sums).sum(0)
    for rows in halves:
        found = rank(rows, lambda each: each.copy_(total))
        assert found.mean_entropy == pytest.approx(whole.mean_entropy)
        torch.testing.assert_close(found.steering_weights(STEERED), whole.steering_weights(STEERED, rows))
    shifts = []
    found = replace(whole, all_reduce=lambda each: shifts.append(each.clone()) or each.mul_(2))
    assert found.entropy_shift(0.5 * statistics.entropy) == pytest.approx(math.log(0.5))
    assert len(shifts) == 1


def test_a_shift_needs_active_tokens_and_is_bounded():
    statistics, advantage, weight = step(2)
    tokens = StepTokens.measure(statistics, advantage, weight)
    assert tokens.entropy_shift(statistics.entropy[:0], slice(0, 0)) is None
    assert StepTokens.measure(statistics, 0 * advantage, weight).entropy_shift(statistics.entropy) is None
    assert tokens.entropy_shift(torch.full_like(statistics.entropy, torch.nan)) is None
    assert tokens.entropy_shift(0 * statistics.entropy) == pytest.approx(math.log(1e-3))


def test_bad_arguments_are_named():
    statistics, advantage, weight = step(0)
    with pytest.raises(ValueError, match="pass second_moments=True"):
        StepTokens.measure(replace(statistics, sum_squared_prob=None), advantage, weight)
    with pytest.raises(ValueError, match=r"advantage: must have the shape of the statistics, \[60\], found \[3\]"):
        StepTokens.measure(statistics, advantage[:3], weight)
    with pytest.raises(ValueError, match=r"token_weight: .* found \[4\]"):
        StepTokens.measure(statistics, advantage, weight[:4])
    with pytest.raises(ValueError, match="0 for every token of the step"):
        StepTokens.measure(statistics, advantage, 0 * weight)
