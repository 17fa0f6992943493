"""The tables that map weights between megatron-core and Hugging Face."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megatron_rlvr.megatron.families import FAMILIES
from megatron_rlvr.megatron.families.weight_map import QKV, GatedMLP, Plain, WeightTable
from megatron_rlvr.megatron.weight_shards import local_name

HF = SimpleNamespace(hidden_size=24, num_attention_heads=8, num_key_value_heads=4, head_dim=3)
MAPS = {
    "plain": (Plain("a.*.weight", "b.*.weight"), [(12, 5)]),
    "gated": (GatedMLP("a.*.weight", "gate.*", "up.*"), [(8, 5), (8, 5)]),
    "qkv": (QKV("a.*.weight", "q.*", "k.*", "v.*"), [(24, 5), (12, 5), (12, 5)]),
    "qkv-bias": (QKV("a.*.bias", "q.*", "k.*", "v.*"), [(24,), (12,), (12,)]),
}


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("kind", MAPS)
def test_a_shard_consists_of_the_same_shard_of_each_tensor(kind: str, ranks: int) -> None:
    entry, shapes = MAPS[kind]
    tensors = [torch.randn(shape) for shape in shapes]
    for rank in range(ranks):
        own = [tensor.chunk(ranks)[rank] for tensor in tensors]
        back = entry.to_huggingface(entry.to_megatron(own, HF), HF)
        for part, expected in zip(back, own, strict=True):
            torch.testing.assert_close(part, expected, rtol=0, atol=0)


def test_qkv_has_the_rows_of_a_group_together() -> None:
    entry, shapes = MAPS["qkv-bias"]
    query, key, value = (torch.arange(shape[0]) + offset for shape, offset in zip(shapes, (0, 100, 200), strict=True))
    rows = entry.to_megatron([query, key, value], HF).tolist()
    # Two query heads of size 3, a key head and a value head per group.
    assert rows[:12] == [0, 1, 2, 3, 4, 5, 100, 101, 102, 200, 201, 202]
    assert rows[12:18] == [6, 7, 8, 9, 10, 11]


def test_numbers_of_layer_and_expert_are_carried_over() -> None:
    table = FAMILIES["qwen3_moe"].table
    entry, names = table.find("decoder.layers.3.mlp.experts.local_experts.17.linear_fc1.weight")
    assert isinstance(entry, GatedMLP)
    assert names == [f"model.layers.3.mlp.experts.17.{part}_proj.weight" for part in ("gate", "up")]


def test_a_weight_that_the_table_lacks() -> None:
    with pytest.raises(LookupError, match=r"no entry for the weight a\.b"):
        WeightTable([Plain("a.*", "c.*")]).find("a.b")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("decoder.layers.0.self_attention.linear_qkv.layer_norm_weight", "decoder.layers.0.input_layernorm.weight"),
        ("decoder.layers.12.mlp.linear_fc1.layer_norm_weight", "decoder.layers.12.pre_mlp_layernorm.weight"),
        (
            "decoder.layers.1.mlp.experts.linear_fc2.weight15",
            "decoder.layers.1.mlp.experts.local_experts.15.linear_fc2.weight",
        ),
        (
            "decoder.layers.3.self_attention.linear_kv_up_proj.layer_norm_weight",
            "decoder.layers.3.self_attention.kv_layernorm.weight",
        ),
        (
            "decoder.layers.3.self_attention.linear_q_up_proj.layer_norm_weight",
            "decoder.layers.3.self_attention.q_layernorm.weight",
        ),
        ("decoder.layers.1.mlp.linear_fc2.weight", "decoder.layers.1.mlp.linear_fc2.weight"),
    ],
)
def test_names_of_transformer_engine(name: str, expected: str) -> None:
    assert local_name(name) == expected
