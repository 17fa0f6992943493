"""Parallel sizes that do not divide the model are refused by name."""

from __future__ import annotations

import pytest
from transformers import Qwen2Config

from megatron_rlvr.errors import UserError
from megatron_rlvr.megatron.config import ParallelConfig
from megatron_rlvr.megatron.layout_checks import check_layout

MODEL = Qwen2Config(
    num_attention_heads=12, num_key_value_heads=4, intermediate_size=96, vocab_size=120, num_hidden_layers=6
)


@pytest.mark.parametrize(
    ("parallel", "expected"),
    [
        (ParallelConfig(tensor=5), "parallel.tensor=5 does not divide the model's 12 attention heads"),
        (ParallelConfig(tensor=6), "parallel.tensor=6 does not divide the model's 4 key/value heads"),
        (ParallelConfig(pipeline=4), "parallel.pipeline=4 does not divide the model's 6 layers"),
    ],
)
def test_refused(parallel: ParallelConfig, expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        check_layout(MODEL, parallel)


def test_allowed() -> None:
    check_layout(MODEL, ParallelConfig(tensor=4, pipeline=3))
