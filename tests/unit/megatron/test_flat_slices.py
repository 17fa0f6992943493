"""Flat slices as rectangles of stored tensors."""

from __future__ import annotations

import math
import random
from itertools import pairwise

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from megatron_rlvr.megatron.flat_slices import rectangles, slices_of


@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5), (1, 6), (4, 1), (3, 4, 5), (2, 1, 3, 4)])
def test_rectangles_follow_one_another_and_cover_the_slice(shape: tuple[int, ...]) -> None:
    count = math.prod(shape)
    numbers = torch.arange(count).view(shape)
    for start in range(count + 1):
        for end in range(start, count + 1):
            found = list(rectangles(shape, start, end))
            values = [
                numbers[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))].flatten()
                for offsets, sizes in found
            ]
            assert torch.cat([torch.empty(0, dtype=torch.int64), *values]).tolist() == list(range(start, end))
            assert len(found) <= max(1, 2 * len(shape) - 1)


def _halves(key: str, tensor: torch.Tensor, replica_id: tuple, _: object) -> list[ShardedTensor]:
    """The two halves of a shard apart, as megatron-core stores gate and up projection; the second of two ranks."""
    return [
        ShardedTensor.from_rank_offsets(
            key, half, (0, 1, 3), (1, 2 * number + 1, 4), replica_id=replica_id, prepend_axis_num=1
        )
        for number, half in enumerate(tensor.chunk(2))
    ]


@pytest.mark.parametrize("seed", range(5))
def test_slices_of_all_ranks_are_the_stored_tensor(seed: int) -> None:
    """A parameter [6, 5] of the second of three layers, on the second of two tensor ranks, divided over data ranks."""
    generator = random.Random(seed)
    parameter = torch.randn(6, 5)
    factory = ShardedTensorFactory("weight", parameter, _halves, lambda parts: torch.cat(parts), (0, 0, 0))
    bounds = [0, *sorted(generator.sample(range(1, 30), 4)), 30]
    stored = torch.zeros(3, 12, 5)
    for start, end in pairwise(bounds):
        for part in slices_of(factory, "state", start, parameter.flatten()[start:end]):
            assert part.shard.key == "state" and part.shard.global_shape == (3, 12, 5) and part.is_written
            for chunk, data in part.rectangles():
                region = tuple(slice(o, o + s) for o, s in zip(chunk.offsets, chunk.sizes, strict=True))
                assert not stored[region].any()
                stored[region] = data
    assert stored[1, 3:6].equal(parameter[:3]) and stored[1, 9:].equal(parameter[3:])
    assert int(stored.count_nonzero()) == 30


def test_a_parameter_that_is_stored_in_another_order_is_refused() -> None:
    def transposed(key: str, tensor: torch.Tensor, replica_id: tuple, _: object) -> ShardedTensor:
        return ShardedTensor.from_rank_offsets(key, tensor.t().contiguous(), replica_id=replica_id)

    parameter = torch.randn(3, 4)
    factory = ShardedTensorFactory("weight", parameter, transposed, lambda part: part.t(), (0, 0, 0))
    with pytest.raises(NotImplementedError, match="state is stored in another order than the parameter"):
        list(slices_of(factory, "state", 0, parameter.flatten()))


def test_one_of_equal_shards_is_written() -> None:
    def written(replica_id: tuple[int, int, int]) -> bool:
        entry = ShardedTensor.from_rank_offsets("norm", torch.ones(4), replica_id=replica_id)
        [part] = slices_of(entry, "state", 1, torch.ones(2))
        return part.is_written

    assert written((0, 0, 0)) and written((0, 0, 3))  # each data-parallel rank has another slice
    assert not written((0, 1, 0)) and not written((1, 0, 0))
