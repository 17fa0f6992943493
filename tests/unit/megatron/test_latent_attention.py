"""Latent attention: positions of packed tokens, the rotation, and the names of its norms in a checkpoint."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch

from megatron_rlvr.data.microbatch import zigzag
from megatron_rlvr.megatron.bridge import PolicyBridge
from megatron_rlvr.megatron.config import ModelConfig, ParallelConfig
from megatron_rlvr.megatron.latent_attention import latent_rotary, packed_positions, rotate_pairs
from megatron_rlvr.megatron.parallel import parallel_groups
from tests.families import make_family


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


def test_a_checkpoint_names_weights_as_transformer_engine_does(tmp_path: Path) -> None:
    """megatron-core 0.16.1, `get_gpt_layer_with_transformer_engine_spec`: which norms are parts of projections."""
    folder = make_family(tmp_path, "deepseek-v3")
    with parallel_groups(ParallelConfig(), seed=0):
        [model] = PolicyBridge(ModelConfig(str(folder), "float32", layer_spec="local"), ParallelConfig()).build(True)
        state = {entry.key for entry in model.sharded_state_dict().values()}
    found = {key for key in state if "layers.1.self_attention" in key or "norm" in key}
    attention = "decoder.layers.{}.self_attention"
    expected = {"decoder.final_layernorm.weight", "decoder.layers.0.mlp.linear_fc1.layer_norm_weight"}
    expected |= {f"decoder.layers.{layer}.input_layernorm.weight" for layer in (0, 1)}
    expected.add("decoder.layers.1.pre_mlp_layernorm.weight")  # not fused with grouped experts
    for layer in (0, 1):
        expected |= {f"{attention}.linear_{x}_up_proj.layer_norm_weight".format(layer) for x in ("q", "kv")}
    linear = ["linear_proj", *(f"linear_{x}_{way}_proj" for x in ("q", "kv") for way in ("down", "up"))]
    expected |= {f"{attention}.{name}.{key}".format(1) for name in linear for key in ("weight", "_extra_state")}
    assert found == expected
