"""Microbatches against a plain loop over sequences."""

from __future__ import annotations

import pytest
import torch

from megatron_rlvr.data.batch import RolloutBatch
from megatron_rlvr.rollout.engine import Completion

PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8]]
RESPONSES = [[10], [11, 12, 13], [14, 15], [16, 17, 18, 19]]


@pytest.fixture
def batch() -> RolloutBatch:
    completions = [
        Completion(ids, [-0.5 * i for i in ids], "stop" if n % 2 else "length", 0) for n, ids in enumerate(RESPONSES)
    ]
    return RolloutBatch.from_completions(PROMPTS, completions, [0.0, 1.0, 0.0, 1.0], padding=99)


@pytest.mark.parametrize("size", [0, 1, 3])
@pytest.mark.parametrize("multiple_of", [1, 4])
def test_rows_predict_exactly_the_response_tokens(batch: RolloutBatch, size: int, multiple_of: int) -> None:
    chosen = torch.tensor([3, 0, 1])
    seen = []
    for part in batch.microbatches(chosen, size, multiple_of):
        b, s = part.tokens.shape
        assert s % multiple_of == 0
        for row, target, flat, index in zip(
            *(x.tolist() for x in (part.rows, part.targets, part.flat, part.sequence_index)), strict=True
        ):
            position, sequence = divmod(row, b)
            assert sequence == index
            assert part.tokens[sequence, position + 1] == target
            number = int(part.sequences[sequence])
            offset = sum(len(r) for r in RESPONSES[:number])
            head = PROMPTS[number // 2]
            assert target == RESPONSES[number][flat - offset]
            assert part.tokens[sequence, : position + 1].tolist() == (head + RESPONSES[number])[: position + 1]
            seen.append(flat)
    assert sorted(seen) == [0, 1, 2, 3, 6, 7, 8, 9]  # tokens of sequences 0, 1 and 3, each once


def test_flat_arrays_and_flags(batch: RolloutBatch) -> None:
    assert batch.rollout_logprob.tolist() == [-0.5 * t for r in RESPONSES for t in r]
    assert batch.offsets.tolist() == [0, 1, 4, 6]
    assert batch.truncated.tolist() == [True, False, True, False]
    assert batch.group_size == 2
    assert [m.tolist() for m in batch.minibatches(2)] == [[0, 1], [2, 3]]
