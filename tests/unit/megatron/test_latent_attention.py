"""Latent attention: positions of packed tokens, the rotation, and the names of its norms in a checkpoint."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from megatron_rlvr.data.microbatch import zigzag
from megatron_rlvr.megatron.latent_attention import latent_rotary, packed_positions, rotate_pairs


@pytest.mark.parametrize("size", [1, 2, 3])
def test_packed_positions_are_those_of_the_zigzag_order(size: int) -> None:
    lengths = torch.tensor([6, 2, 10, 4, 2]) * size
    boundaries = [0, *lengths.cumsum(0).tolist()]
    position = torch.cat([torch.arange(end - start) for start, end in pairwise(boundaries)])
    for rank in range(size):
        local = zigzag(boundaries, size, rank) if size > 1 else torch.arange(boundaries[-1])
        found = packed_positions(torch.tensor(boundaries, dtype=torch.int32), len(local), size, rank)
        assert found.equal(position[local])


def test_scores_depend_on_the_distance_of_rotated_pairs_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(1, 1, 1, 8, dtype=torch.float64, generator=generator) for _ in range(2))
    frequencies = torch.tensor([1.0, 0.3, 0.1, 0.01], dtype=torch.float64)

    def score(first: int, second: int) -> float:
        angles = [(position * frequencies).repeat(2)[None, None, None] for position in (first, second)]
        rotated = [rotate_pairs(v, latent_rotary(a, 1.5, v.dtype)) for v, a in zip((x, y), angles, strict=True)]
        return float((rotated[0] * rotated[1]).sum())

    # Pairs (x0, x1), (x2, x3), ... as complex numbers, and 1.5 times each.
    a, b = (torch.view_as_complex(v.unflatten(-1, (4, 2))).flatten() for v in (x, y))
    expected = 2.25 * (a.conj() * b * torch.exp(1j * frequencies * 5)).real.sum()
    assert score(2, 7) == pytest.approx(float(expected))
    assert score(40, 45) == pytest.approx(float(expected))
