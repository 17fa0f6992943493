"""The weights of this rank from the tensors of a Hugging Face folder, without communication."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_rlvr.megatron.families import Family
from megatron_rlvr.megatron.families.weight_map import Vocabulary
from megatron_rlvr.megatron.huggingface_config import is_tied
from megatron_rlvr.megatron.model import PolicyModel
from megatron_rlvr.megatron.weight_shards import Shard, shards

OUTPUT, EMBEDDING = "output_layer.weight", "embedding.word_embeddings.weight"


def stored_name(name: str, hf_config: Any) -> str:
    """Return the weight whose Hugging Face tensors hold the weight `name`: the embedding, for a tied output layer."""
    return EMBEDDING if name == OUTPUT and is_tied(hf_config) else name


class TensorReader(Protocol):
    """Reads tensors by name. Raises KeyError for a name that it does not have."""

    def shape(self, name: str) -> list[int]:
        """The shape of a tensor."""
        ...

    def read(self, name: str, dim: int | None, start: int, stop: int) -> Tensor:
        """The part from `start` to `stop` of dimension `dim`; all of the tensor if `dim` is None."""
        ...


class WeightShapeError(ValueError):
    """A tensor has another shape than config.json describes."""


def load_weights(model_chunks: Sequence[PolicyModel], family: Family, hf_config: Any, reader: TensorReader) -> None:
    """Copy the weights of a Hugging Face model into this rank's model chunks, one weight at a time.

    Each rank reads only its own shards.

    Raises:
        KeyError: if a tensor is missing.
        WeightShapeError: if one has another shape than config.json describes.
    """
    expert_rank = parallel_state.get_expert_model_parallel_rank()
    with torch.no_grad():
        for shard in shards(model_chunks):
            name = stored_name(shard.name_on(expert_rank), hf_config)
            shard.weight.copy_(_read(shard, name, family, hf_config, reader))


def _read(shard: Shard, name: str, family: Family, hf_config: Any, reader: TensorReader) -> Tensor:
    entry, hf_names = family.table.find(name)
    shapes = [list(part.shape) for part in entry.to_huggingface(shard.weight.detach(), hf_config)]
    tensors = []
    for hf_name, shape in zip(hf_names, shapes, strict=True):
        whole, start, stop = list(shape), 0, 0
        if shard.dim is not None:
            size = shape[shard.dim]
            whole[shard.dim] = size * shard.group.size()
            start, stop = shard.group.rank() * size, (shard.group.rank() + 1) * size
        if isinstance(entry, Vocabulary):
            whole[0] = hf_config.vocab_size
            start, stop = min(start, whole[0]), min(stop or whole[0], whole[0])
        if (stored := reader.shape(hf_name)) != whole:
            raise WeightShapeError(f"{hf_name} has shape {stored}, but config.json describes {whole}")
        split = shard.dim if not isinstance(entry, Vocabulary) else 0
        tensors.append(reader.read(hf_name, split, start, stop))
    weight = entry.to_megatron(tensors, hf_config)
    if missing := shard.weight.size(0) - weight.size(0):  # padding of the vocabulary
        weight = torch.cat([weight, weight.new_zeros(missing, *weight.shape[1:])])
    return weight
