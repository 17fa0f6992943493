"""Aggregation weights compared with the means that they represent, for a minibatch and for its microbatches."""

import pytest
import torch

from megatron_rlvr.objectives import aggregation_weights

LENGTHS = torch.tensor([3, 1, 0, 5])
VALUES = [[0.5, -1.0, 2.0], [4.0], [], [1.0, 1.5, -2.0, 0.25, 3.0]]


def expected(mode):
    flat = [v for sequence in VALUES for v in sequence]
    if mode == "token-mean":
        return sum(flat) / len(flat)
    if mode == "sequence-mean":
        return sum(sum(s) / len(s) for s in VALUES if s) / len(VALUES)
    return sum(flat) / (len(VALUES) * 8)


@pytest.mark.parametrize("mode", ["token-mean", "sequence-mean", "constant"])
def test_the_weighted_sum_is_the_mean_it_stands_for(mode):
    weights = aggregation_weights(mode, LENGTHS, 8).tolist()
    total = sum(w * v for w, sequence in zip(weights, VALUES, strict=True) for v in sequence)
    assert total == pytest.approx(expected(mode), rel=1e-6)
    assert weights[2] == 0.0


@pytest.mark.parametrize("mode", ["token-mean", "sequence-mean", "constant"])
def test_ranks_that_know_the_totals_get_the_same_weights(mode):
    of_minibatch = aggregation_weights(mode, LENGTHS, 8)
    of_ranks = [aggregation_weights(mode, part, 8, sequence_count=4, token_count=9) for part in LENGTHS.split(2)]
    assert torch.equal(torch.cat(of_ranks), of_minibatch)


def test_bad_requests_are_refused():
    with pytest.raises(ValueError, match="valid: token-mean, sequence-mean, constant"):
        aggregation_weights("mean", LENGTHS, 8)
    with pytest.raises(ValueError, match="no response token"):
        aggregation_weights("token-mean", torch.tensor([0, 0]), 8)
    with pytest.raises(ValueError, match="max_tokens"):
        aggregation_weights("constant", LENGTHS, 0)
