"""Adapters in a checkpoint: stored under their PEFT names, whatever the layout. The frozen weights are not stored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor

from megatron_rlvr.megatron.lora_layers import Adapter
from megatron_rlvr.megatron.model import PolicyModel


def sharded_state(chunk: PolicyModel) -> dict[str, Any]:
    """Return megatron-core's description of the adapters of a model chunk, by their name in the chunk."""
    names = {parameter: name for name, parameter in chunk.named_parameters()}
    return {
        names[parameter]: _described(adapter, key, parameter, dim)
        for adapter in chunk.modules()
        if isinstance(adapter, Adapter)
        for key, parameter, dim in adapter.tensors()
    }


def _described(adapter: Adapter, key: str, parameter: Tensor, dim: int | None) -> ShardedTensor:
    group = adapter.group
    offsets = [] if dim is None else [(dim, group.rank(), group.size())]
    if adapter.of_expert:
        copy = parallel_state.get_expert_data_parallel_rank()
    else:
        copy = parallel_state.get_data_parallel_rank(with_context_parallel=True)
    replica = (0, group.rank() if dim is None else 0, copy)
    return ShardedTensor.from_rank_offsets(key, parameter, *offsets, replica_id=replica)


@torch.no_grad()
def load(chunk: PolicyModel, state: Mapping[str, Tensor]) -> None:
    """Copy loaded adapters into a model chunk."""
    for name, tensor in state.items():
        chunk.get_parameter(name).copy_(tensor)
