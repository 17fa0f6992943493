"""How the weights of megatron-core's layers and the tensors of a Hugging Face folder correspond.

A family (`megatron_rlvr.megatron.families`) is a table of the classes below. Each names one weight of megatron-core's
local layers, with ``*`` for the numbers of its layer and expert, and the Hugging Face tensors that it consists of.

Every conversion works on whole weights and on the shards of a tensor-parallel rank alike: a shard consists of the same
shard of each Hugging Face tensor. So a rank reads only its shards, and an export gathers tensors after conversion.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Plain:
    """A weight that is one Hugging Face tensor, unchanged."""

    megatron: str
    huggingface: str

    @property
    def names(self) -> tuple[str, ...]:
        """Patterns of the Hugging Face tensors."""
        return (self.huggingface,)

    def to_megatron(self, tensors: Sequence[Tensor], hf_config: Any) -> Tensor:
        """Convert Hugging Face tensors, in the order of `names`, to the weight."""
        [tensor] = tensors
        return tensor

    def to_huggingface(self, weight: Tensor, hf_config: Any) -> list[Tensor]:
        """Convert the weight to Hugging Face tensors, in the order of `names`, as views where possible."""
        return [weight]


@dataclass(frozen=True)
class Vocabulary(Plain):
    """A weight with one row per token, padded with rows of zeros so that all tensor-parallel ranks have as many."""


@dataclass(frozen=True)
class Float32(Plain):
    """A weight that is in float32, whatever the dtype of the model."""


@dataclass(frozen=True)
class GatedMLP:
    """The weight of gate and up projection [2 f, h], gate first, from two Hugging Face tensors [f, h]."""

    megatron: str
    gate: str
    up: str

    @property
    def names(self) -> tuple[str, ...]:
        return (self.gate, self.up)

    def to_megatron(self, tensors: Sequence[Tensor], hf_config: Any) -> Tensor:
        return torch.cat(list(tensors))

    def to_huggingface(self, weight: Tensor, hf_config: Any) -> list[Tensor]:
        return list(weight.chunk(2))


@dataclass(frozen=True)
class QKV:
    """The weight or bias of queries, keys and values, from three Hugging Face tensors.

    megatron-core orders rows by groups of heads: the query heads of a group, its key head, its value head.
    """

    megatron: str
    query: str
    key: str
    value: str

    @property
    def names(self) -> tuple[str, ...]:
        return (self.query, self.key, self.value)

    def to_megatron(self, tensors: Sequence[Tensor], hf_config: Any) -> Tensor:
        head_size = head_size_of(hf_config)
        groups = tensors[1].size(0) // head_size
        return torch.cat([tensor.unflatten(0, (groups, -1)) for tensor in tensors], dim=1).flatten(0, 1)

    def to_huggingface(self, weight: Tensor, hf_config: Any) -> list[Tensor]:
        head_size = head_size_of(hf_config)
        query_rows = hf_config.num_attention_heads // hf_config.num_key_value_heads * head_size
        grouped = weight.unflatten(0, (-1, query_rows + 2 * head_size))
        return [part.flatten(0, 1) for part in grouped.split([query_rows, head_size, head_size], dim=1)]


WeightMap = Plain | GatedMLP | QKV


def head_size_of(hf_config: Any) -> int:
    """The size of an attention head."""
    return getattr(hf_config, "head_dim", None) or hf_config.hidden_size // hf_config.num_attention_heads


class WeightTable:
    """The weight maps of a family, found by name.

    Args:
        maps: one map per weight.
    """

    def __init__(self, maps: Sequence[WeightMap]):
        self._maps = [(_pattern(entry.megatron), entry) for entry in maps]

    def find(self, name: str) -> tuple[WeightMap, list[str]]:
        """Return the map of a weight and the names of its Hugging Face tensors.

        Args:
            name: the name of the weight in a model of local layers, with the numbers of its layer and expert in the
                whole model.

        Raises:
            LookupError: if the table has no such weight.
        """
        for pattern, entry in self._maps:
            if match := pattern.fullmatch(name):
                numbers = match.groups()
                return entry, [_fill(hf_name, numbers) for hf_name in entry.names]
        raise LookupError(f"no entry for the weight {name}")


def _pattern(name: str) -> re.Pattern[str]:
    return re.compile(re.escape(name).replace(r"\*", r"(\d+)"))


def _fill(name: str, numbers: Sequence[str]) -> str:
    for number in numbers:
        name = name.replace("*", number, 1)
    return name
