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


def test_epoch_of_a_step():
    sampler = PromptSampler(10, 4, 0)
    assert [sampler.epoch(step) for step in range(6)] == [0, 0, 0, 1, 1, 2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 1, 0), "the data set has 0 examples"),
        ((4, 5, 0), r"between 1 and the number of examples \(4\), found 5"),
        ((4, 0, 0), "found 0"),
        ((4, 2, -1), "seed"),
    ],
)
def test_impossible_samplers(arguments, message):
    with pytest.raises(UserError, match=message):
        PromptSampler(*arguments)
    with pytest.raises(ValueError, match="negative"):
        PromptSampler(4, 2, 0).indices(-1)
