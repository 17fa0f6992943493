import pytest

from megatron_rlvr.data import PromptSampler
from megatron_rlvr.errors import UserError


@pytest.mark.parametrize("seed", [0, 1, 17])
@pytest.mark.parametrize(("count", "per_step"), [(10, 3), (7, 7), (64, 16), (5, 4)])
def test_every_epoch_draws_every_prompt_once(count, per_step, seed):
    sampler = PromptSampler(count, per_step, seed)
    drawn = [index for step in range(3 * count) for index in sampler.indices(step)]
    epochs = [drawn[start : start + count] for start in range(0, len(drawn), count)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1  # reshuffled


def test_a_step_depends_on_seed_and_step_alone():
    in_order = PromptSampler(100, 16, 3)
    expected = [in_order.indices(step) for step in range(20)]
    backwards = PromptSampler(100, 16, 3)
    assert [backwards.indices(step) for step in reversed(range(20))] == expected[::-1]
    assert PromptSampler(100, 16, 3).indices(19) == expected[19]
    assert PromptSampler(100, 16, 4).indices(0) != expected[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 1, 0), "the data set has 0 examples"),
        ((4, 5, 0), "prompts_per_step=5 must be between 1 and the number of examples, 4"),
        ((4, 0, 0), "prompts_per_step=0"),
        ((4, 2, -1), "seed"),
    ],
)
def test_impossible_samplers(arguments, message):
    with pytest.raises(UserError, match=message):
        PromptSampler(*arguments)
    with pytest.raises(ValueError, match="negative"):
        PromptSampler(4, 2, 0).indices(-1)


@pytest.mark.parametrize("seed", [0, 1, 17])
def test_a_stratified_step_draws_one_prompt_from_every_stratum(seed):
    strata = [float((7 * i) % 96) for i in range(96)]  # all different, not sorted
    sampler = PromptSampler(96, 12, seed, strata)
    drawn = [sampler.indices(step) for step in range(24)]
    assert all(sorted(strata[i] // 8 for i in indices) == list(range(12)) for indices in drawn)
    for epoch in range(3):
        assert sorted(i for indices in drawn[8 * epoch : 8 * epoch + 8] for i in indices) == list(range(96))
    assert [sorted(indices) for indices in drawn[:8]] != [sorted(indices) for indices in drawn[8:16]]  # reshuffled
    assert [int(strata[i] // 8) for i in drawn[0]] != [int(strata[i] // 8) for i in drawn[1]]
    assert PromptSampler(96, 12, seed, strata).indices(5) == drawn[5]
    assert PromptSampler(96, 12, seed + 1, strata).indices(5) != drawn[5]


@pytest.mark.parametrize("seed", [0, 1, 17])
def test_strata_of_unequal_size_stay_balanced(seed):
    """If the steps do not divide an epoch, the mean stratum of a step still varies far less than without strata."""
    strata = [float(i) for i in range(1000)]
    for count, per_step in ((1000, 96), (1000, 64)):
        spread = []
        for stratify_by in (strata, None):
            sampler = PromptSampler(count, per_step, seed, stratify_by)
            drawn = [sampler.indices(step) for step in range(60)]
            means = [sum(strata[i] for i in indices) / per_step for indices in drawn]
            spread.append(sum((m - 499.5) ** 2 for m in means) ** 0.5)
        assert spread[0] < 0.4 * spread[1]
