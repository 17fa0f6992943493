"""The weights of this rank under their names in the whole model, and which shard of each the rank holds."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_rlvr.megatron.model import PolicyModel

# Transformer Engine fuses a norm with the linear layer that follows it, and holds all experts of a rank in one module.
_LOCAL_NAMES = (
    (re.compile(r"\.self_attention\.linear_qkv\.layer_norm_weight$"), ".input_layernorm.weight"),
    (re.compile(r"\.mlp\.linear_fc1\.layer_norm_weight$"), ".pre_mlp_layernorm.weight"),
    (re.compile(r"\.linear_(q|kv)_up_proj\.layer_norm_weight$"), r".\1_layernorm.weight"),
    (re.compile(r"\.experts\.(linear_fc\d)\.weight(\d+)$"), r".experts.local_experts.\2.\1.weight"),
)
ADAPTERS = ".adapters."
"""Part of the names of all parameters of adapters (`lora.py`)."""
_LAYER = re.compile(r"(?<=^decoder\.layers\.)\d+")
_EXPERT = re.compile(r"(?<=\.local_experts\.)\d+")


@dataclass(frozen=True)
class Shard:
    """A weight of this rank.

    Attributes:
        name: its name in a whole model of local layers, except that the number of an expert counts on this rank.
        weight: the parameter, or a buffer that belongs to the model.
        owner: the module that holds it.
        group: the ranks that each hold a shard of it.
        dim: the dimension that they split; None if each of them holds all of it.
        expert: the number of its expert on this rank, or None.
        experts_per_rank: experts of a layer on each expert-parallel rank; 0 if the weight is not of an expert.
    """

    name: str
    weight: Tensor
    owner: torch.nn.Module
    group: dist.ProcessGroup
    dim: int | None
    expert: int | None = None
    experts_per_rank: int = 0

    def name_on(self, expert_rank: int) -> str:
        """Return the name in the whole model of the weight that another expert-parallel rank has in its place."""
        if self.expert is None:
            return self.name
        return _EXPERT.sub(str(expert_rank * self.experts_per_rank + self.expert), self.name)


def local_name(name: str) -> str:
    """Return the name that a weight of Transformer Engine's layers has in local layers; other names are unchanged."""
    for pattern, replacement in _LOCAL_NAMES:
        name = pattern.sub(replacement, name)
    return name


def shards(model_chunks: Sequence[PolicyModel]) -> Iterator[Shard]:
    """Yield the weights of this rank, in the order of their modules."""
    tensor_group = parallel_state.get_tensor_model_parallel_group()
    expert_group = parallel_state.get_expert_tensor_parallel_group()
    expert_ranks = parallel_state.get_expert_model_parallel_world_size()
    for chunk in model_chunks:
        experts_per_rank = (chunk.config.num_moe_experts or 0) // expert_ranks
        layer_numbers = [layer.layer_number - 1 for layer in chunk.decoder.layers]
        for own_name, weight in weights_of(chunk):
            name, owner = local_name(own_name), chunk.get_submodule(own_name.rpartition(".")[0])
            if layer := _LAYER.search(name):
                name = _LAYER.sub(str(layer_numbers[int(layer[0])]), name, count=1)
            expert = _EXPERT.search(name)
            if expert:
                # Grouped experts of Transformer Engine do not say how they are split.
                split_dim = (0 if ".linear_fc1." in name else 1) if expert_group.size() > 1 else None
                yield Shard(name, weight, owner, expert_group, split_dim, int(expert[0]), experts_per_rank)
                continue
            split = getattr(weight, "tensor_model_parallel", False) and tensor_group.size() > 1
            dim: int | None = weight.partition_dim if split else None  # type: ignore[attr-defined]
            yield Shard(name, weight, owner, tensor_group, dim)


def weights_of(chunk: PolicyModel) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters of a model chunk, without adapters, and the buffers that a Hugging Face folder has."""
    for name, parameter in chunk.named_parameters():
        if ADAPTERS not in name:
            yield name, parameter
    for name, buffer in chunk.named_buffers():
        if name.endswith(".router.expert_bias"):  # balances load, so that it has no gradient
            yield name, buffer
