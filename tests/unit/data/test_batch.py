"""Microbatches against a plain loop over sequences."""

from __future__ import annotations

import pytest
import torch

from megatron_rlvr.checked_input import InvalidInputError
from megatron_rlvr.data.batch import RolloutBatch
from megatron_rlvr.data.completion import Completion, checked_completion
from megatron_rlvr.data.kept_tokens import KeptTokens
from megatron_rlvr.data.microbatch import MicrobatchConfig, build_microbatch, partition, zigzag

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
    config = MicrobatchConfig(sequences=size, width_multiple=multiple_of)
    for microbatch in (build_microbatch(batch, members, config) for members in partition(batch, chosen, config)):
        b, s = microbatch.tokens.shape
        assert s % multiple_of == 0
        for row, target, flat, index in zip(
            *(
                x.tolist()
                for x in (microbatch.rows, microbatch.targets, microbatch.token_index, microbatch.sequence_index)
            ),
            strict=True,
        ):
            position, sequence = divmod(row, b)
            assert sequence == index
            assert microbatch.tokens[sequence, position + 1] == target
            number = int(microbatch.sequences[sequence])
            offset = sum(len(r) for r in RESPONSES[:number])
            head = PROMPTS[number // 2]
            assert target == RESPONSES[number][flat - offset]
            assert microbatch.tokens[sequence, : position + 1].tolist() == (head + RESPONSES[number])[: position + 1]
            seen.append(flat)
    assert sorted(seen) == [0, 1, 2, 3, 6, 7, 8, 9]  # tokens of sequences 0, 1 and 3, each once


def test_flat_arrays_and_flags(batch: RolloutBatch) -> None:
    assert batch.rollout_logprob.tolist() == [-0.5 * t for r in RESPONSES for t in r]
    assert batch.offsets.tolist() == [0, 1, 4, 6]
    assert batch.truncated.tolist() == [True, False, True, False]
    assert batch.group_size == 2
    assert [m.tolist() for m in batch.minibatches(2)] == [[0, 1], [2, 3]]


@pytest.mark.parametrize("config", [MicrobatchConfig(), MicrobatchConfig(tokens=30), MicrobatchConfig(context_size=2)])
def test_kept_sets_follow_their_tokens(config: MicrobatchConfig) -> None:
    sets = [[[token, token % 3, 90 - position] for position, token in enumerate(ids)] for ids in RESPONSES]
    sets[1][2] = [13]
    completions = [
        Completion(ids, [-1.0] * len(ids), "stop", 0, kept=KeptTokens.of(kept))
        for ids, kept in zip(RESPONSES, sets, strict=True)
    ]
    batch = RolloutBatch.from_completions(PROMPTS, completions, [0.0, 1.0, 0.0, 1.0], padding=99)
    flat = [sorted(ids) for of_sequence in sets for ids in of_sequence]
    for chosen in ([3, 0, 1], [2], []):
        microbatch = build_microbatch(batch, torch.tensor(chosen, dtype=torch.int64), config)
        local = (
            range(len(microbatch.targets)) if microbatch.local_targets is None else microbatch.local_targets.tolist()
        )
        kept = microbatch.kept
        assert kept is not None and len(kept) == len(local)
        for row, target in enumerate(local):
            ids = kept.ids[kept.offsets[row] : kept.offsets[row + 1]].tolist()
            assert ids == flat[microbatch.token_index[target]] and int(microbatch.targets[target]) in ids


def test_completions_with_and_without_kept_sets_do_not_mix() -> None:
    completions = [Completion([10], [-1.0], "stop", 0, kept=KeptTokens.of([[10]])), Completion([10], [-1.0], "stop", 0)]
    with pytest.raises(ValueError, match="1 of 2 completions have kept sets"):
        RolloutBatch.from_completions([[1]], completions, [0.0, 1.0], padding=99)


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        ([[5, 6]], "2 tokens with 1 kept sets"),
        ([[5, 6], []], "the kept set of token 1 is not a list"),
        ([[5, 6], [7.0]], "the kept set of token 1 is not a list"),
        ([[5, 6], 7], "the kept set of token 1 is not a list"),
        ([[5, 6], [7, True]], "the kept set of token 1 is not a list"),
        ([[5, 6], [7, 7]], "an id twice"),
        ([[5, 6], [7, -1]], "an impossible id"),
        ([[5, 6], [7, 2**31]], "an impossible id"),
        ([[5, 6], [8]], "token 1, 7, is not in its kept set"),
        ("all", "kept sets"),
    ],
)
def test_kept_sets_of_a_file_or_a_server_are_checked(sets: object, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        checked_completion([5, 7], [-1.0, -1.0], "stop", 0, [], max_tokens=9, kept=sets)


def test_zigzag_shares_the_causal_triangle() -> None:
    assert zigzag([0, 8], 2, 0).tolist() == [0, 1, 6, 7] and zigzag([0, 8], 2, 1).tolist() == [2, 3, 4, 5]
    boundaries = [0, 12, 18, 42]
    ranks = [zigzag(boundaries, 3, rank) for rank in range(3)]
    assert torch.cat(ranks).sort().values.tolist() == list(range(42))
    earlier_keys = [sum(int(p) - max(b for b in boundaries if b <= p) for p in rank.tolist()) for rank in ranks]
    assert len(set(earlier_keys)) == 1


@pytest.mark.parametrize("tokens", [0, 24])
@pytest.mark.parametrize("context", [1, 2, 3])
@pytest.mark.parametrize("multiple_of", [1, 4])
def test_context_parallel_ranks_and_packing(batch: RolloutBatch, tokens: int, context: int, multiple_of: int) -> None:
    chosen = torch.tensor([3, 0, 1, 2])
    seen = []
    for rank in range(context):
        config = MicrobatchConfig(0 if tokens else 3, tokens, multiple_of, context, rank)
        for members in partition(batch, chosen, config):
            microbatch = build_microbatch(batch, members, config)
            count, width = microbatch.tokens.shape
            assert width % multiple_of == 0 and (count == 1 or not tokens)
            reference = build_microbatch(
                batch, members, MicrobatchConfig(config.sequences, tokens, multiple_of * config.length_multiple)
            )
            assert microbatch.targets.equal(reference.targets) and microbatch.token_index.equal(reference.token_index)
            boundaries = [0, width * context] if microbatch.boundaries is None else microbatch.boundaries.tolist()
            local_positions = zigzag(boundaries, context, rank) if context > 1 else torch.arange(width)
            if microbatch.positions is not None:
                assert microbatch.positions.equal(local_positions)
            predicted = (
                torch.arange(len(microbatch.targets)) if microbatch.local_targets is None else microbatch.local_targets
            )
            for row, target, index in zip(
                microbatch.rows.tolist(), predicted.tolist(), microbatch.sequence_index[predicted].tolist(), strict=True
            ):
                position, column = divmod(row, count)
                number = int(microbatch.sequences[index])
                start = boundaries[index] if tokens else 0
                at = int(local_positions[position]) - start - len(PROMPTS[number // 2]) + 1
                assert RESPONSES[number][at] == int(microbatch.targets[target])
                assert tokens or column == index
                text = PROMPTS[number // 2] + RESPONSES[number]
                assert int(microbatch.tokens[column, position]) == text[int(local_positions[position]) - start]
                seen.append(int(microbatch.token_index[target]))
    assert sorted(seen) == list(range(10))


def test_packed_microbatches_are_balanced_within_the_limit(batch: RolloutBatch) -> None:
    lengths = batch.prompt_lengths + batch.response_lengths  # 4, 6, 7, 9
    chosen = torch.arange(4)
    for limit, loads in ((26, [26]), (14, [13, 13]), (9, [4, 6, 7, 9])):
        microbatches = partition(batch, chosen, MicrobatchConfig(tokens=limit))
        assert sorted(int(lengths[members].sum()) for members in microbatches) == loads
        assert torch.cat(microbatches).sort().values.tolist() == [0, 1, 2, 3]


def test_padded_microbatches_hold_sequences_of_similar_length(batch: RolloutBatch) -> None:
    lengths = batch.prompt_lengths + batch.response_lengths  # 4, 6, 7, 9
    chosen = torch.tensor([0, 3, 1, 2])
    for at_least, expected in ((1, [[9, 7], [6, 4]]), (3, [[9, 7], [6], [4]])):
        microbatches = partition(batch, chosen, MicrobatchConfig(sequences=2), at_least)
        assert [lengths[members].tolist() for members in microbatches] == expected
    assert [members.tolist() for members in partition(batch, chosen, MicrobatchConfig(sequences=4))] == [
        chosen.tolist()
    ]


@pytest.mark.parametrize("tokens", [0, 40])
def test_empty_microbatches_fill_up(batch: RolloutBatch, tokens: int) -> None:
    config = MicrobatchConfig(tokens=tokens, context_size=2, width_multiple=3)
    microbatches = partition(batch, torch.tensor([2, 1]), config, at_least=3)
    assert sorted(len(members) for members in microbatches) == [0, 1, 1]
    empty = build_microbatch(batch, next(members for members in microbatches if not len(members)), config)
    assert len(empty.rows) == len(empty.targets) == 0 and empty.tokens.shape == (1, 6)
