"""Low-rank adapters (LoRA, arXiv 2106.09685) next to the linear layers of a model whose own weights are frozen.

An adapter belongs to one Hugging Face module, such as ``q_proj``: its output gains ``alpha / rank * B A x``. One linear
layer of megatron-core may compute several of these modules, such as queries, keys and values. It then has an adapter
for each, so that a folder in PEFT's format holds exactly what was trained.

Adapters are split over tensor-parallel ranks as the weight next to them is. Where a layer splits its output, B is split
and A is whole; where it splits its input, A is split and B is whole. So only activations of size `rank` travel between
ranks, and a merged weight is computed without communication.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import Module, ModuleList, Parameter
from torch.nn.functional import linear

from megatron_rlvr.megatron.config import LoRAConfig
from megatron_rlvr.megatron.families.weight_map import WeightMap
from megatron_rlvr.megatron.weight_shards import Shard

_SPLIT_DIM: dict[str, int | None] = {
    "linear_qkv": 0,
    "linear_q_proj": 0,
    "linear_q_down_proj": None,
    "linear_q_up_proj": 0,
    "linear_kv_down_proj": None,
    "linear_kv_up_proj": 0,
    "linear_proj": 1,
    "linear_fc1": 0,
    "linear_fc2": 1,
}
"""Layers of megatron-core that can have adapters, and the dimension of their weight that tensor-parallel ranks split;
None for those that compute this rank's tokens with the whole weight."""


class Adapter(Module):
    """The adapter of one Hugging Face module, or of this rank's shard of it.

    Attributes:
        module_name: full name of the module, such as ``model.layers.0.self_attn.q_proj``.
        lora_A: [rank, inputs]; `initialize` draws it.
        lora_B: [outputs, rank]; zeros at first, so that training starts from the policy of the frozen weights.
        scale: alpha / rank.
        split: the dimensions of `lora_A` and of `lora_B` that the ranks of `group` split; None for a whole tensor.
        group: the ranks that split the module.
        of_expert: whether the module belongs to an expert.
    """

    def __init__(self, module_name: str, shape: Sequence[int], shard: Shard, split_dim: int | None, lora: LoRAConfig):
        super().__init__()
        outputs, inputs = shape
        self.module_name, self.scale = module_name, lora.alpha / lora.rank
        self.group, self.of_expert = shard.group, shard.expert is not None
        is_split = shard.group.size() > 1
        self.split: dict[str, int | None] = {
            "lora_A": 1 if is_split and split_dim == 1 else None,
            "lora_B": 0 if is_split and split_dim == 0 else None,
        }
        self.lora_A = Parameter(torch.zeros(lora.rank, inputs, dtype=shard.weight.dtype))
        self.lora_B = Parameter(torch.zeros(outputs, lora.rank, dtype=shard.weight.dtype))

    def mark(self, weight: Tensor, sequence_parallel: bool) -> None:
        """Tell megatron-core which ranks hold other values of these parameters, and which ranks sum their gradient.

        Args:
            weight: the frozen weight next to the adapter.
            sequence_parallel: whether tensor-parallel ranks divide the tokens between layers. They also divide those of
                a split expert, whose dispatcher gathers them.
        """
        for name, dim in self.split.items():
            parameter = getattr(self, name)
            parameter.allreduce = getattr(weight, "allreduce", True)
            whole_expert = self.of_expert and self.group.size() == 1  # every tensor-parallel rank has its own experts
            if dim is not None or whole_expert:
                set_tensor_model_parallel_attributes(parameter, True, dim or 0, 1)
            elif self.group.size() > 1:
                parameter.sequence_parallel = sequence_parallel

    def merged(self, weight: Tensor) -> Tensor:
        """Return the weight of the module, or this rank's shard of it, merged with the adapter."""
        return merged(weight, self.lora_A.detach(), self.lora_B.detach(), self.scale)

    def tensors(self) -> Iterator[tuple[str, Parameter, int | None]]:
        """Yield the tensors by their name in a folder of PEFT, less its prefix, with the dimension that is split."""
        for name, dim in self.split.items():
            yield f"{self.module_name}.{name}.weight", getattr(self, name), dim


def merged(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float) -> Tensor:
    """Return ``weight + scale * B A`` [outputs, inputs], computed in float32 and rounded to the type of `weight`."""
    return (weight.float() + scale * (lora_b.float() @ lora_a.float())).to(weight.dtype)


class LayerAdapters(Module):
    """The adapters of one weight of a linear layer: one per Hugging Face module that the weight consists of.

    Args:
        shard: the frozen weight.
        entry: how it consists of Hugging Face tensors.
        module_names: the modules of these tensors.
        chosen: the last parts of the names of modules that get an adapter.
        lora: section ``lora`` of the configuration.
        config: configuration of the model.
        hf_config: transformers configuration of the model.

    Attributes:
        layer_name: megatron-core's name of the linear layer, such as ``linear_qkv``.
        parts: the adapter of each module, or None.
        rows: rows of the weight of each module.
        sequence_parallel: whether ranks divide the tokens outside this layer; generation switches it off.
        enabled: whether the adapters act.
    """

    def __init__(
        self,
        shard: Shard,
        entry: WeightMap,
        module_names: Sequence[str],
        chosen: Sequence[str],
        lora: LoRAConfig,
        config: TransformerConfig,
        hf_config: Any,
    ):
        super().__init__()
        self.entry, self.hf_config = entry, hf_config
        self.layer_name = _layer_of(entry)
        self.split_dim = _SPLIT_DIM[self.layer_name]
        self.sequence_parallel, self.enabled = config.sequence_parallel, True
        # The dispatcher of a mixture gathers the tokens of an expert that ranks split, and sums their outputs.
        exchanges = shard.group.size() > 1 and shard.expert is None and self.split_dim is not None
        self.group = shard.group if exchanges else None
        self.rows = []
        self.parts: list[Adapter | None] = []
        for module_name, part in zip(module_names, entry.to_huggingface(shard.weight.detach(), hf_config), strict=True):
            self.rows.append(part.size(0))
            leaf = module_name.rpartition(".")[2]
            self.parts.append(None)
            if leaf in chosen:
                adapter = Adapter(module_name, part.shape, shard, self.split_dim, lora)
                adapter.mark(shard.weight, config.sequence_parallel)
                self.parts[-1] = adapter
                self.add_module(leaf, adapter)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return what the adapters add to the output of the layer; `hidden` is the input of the layer."""
        adapters = [part for part in self.parts if part is not None]
        low = linear(hidden, torch.cat([adapter.lora_A for adapter in adapters])) * adapters[0].scale
        if self.group is not None:
            low = self._exchange(low, self.group)
        # One matrix for all modules, in the order of rows of the layer's own weight.
        blocks = [
            part.lora_B if part is not None else low.new_empty(rows, 0)
            for part, rows in zip(self.parts, self.rows, strict=True)
        ]
        return linear(low, self.entry.to_megatron(torch.block_diag(*blocks).split(self.rows), self.hf_config))

    def _exchange(self, low: Tensor, group: dist.ProcessGroup) -> Tensor:
        """Give every rank the product with the whole of A, for the tokens of the layer's output."""
        if self.split_dim == 0 and self.sequence_parallel:
            return gather_from_sequence_parallel_region(low, tensor_parallel_output_grad=True, group=group)
        if self.split_dim == 0:
            return copy_to_tensor_model_parallel_region(low, group=group)
        if self.sequence_parallel:
            return reduce_scatter_to_sequence_parallel_region(low, group=group)
        return reduce_from_tensor_model_parallel_region(low, group=group)


class ExpertAdapters(ModuleList):
    """The adapters of a layer of Transformer Engine that computes all experts of this rank, one entry per expert."""

    def forward(self, hidden: Tensor, tokens_per_expert: Sequence[int]) -> Tensor:
        """Like `LayerAdapters.forward`; `hidden` has the tokens of one expert after the other."""
        tokens = hidden.split(list(tokens_per_expert))
        return torch.cat([adapters(part) for adapters, part in zip(self, tokens, strict=True)])


def _layer_of(entry: WeightMap) -> str:
    return entry.megatron.split(".")[-2]


def can_have_adapter(entry: WeightMap) -> bool:
    """Whether an entry of a family's table is the weight of a layer that can have adapters."""
    return entry.megatron.endswith(".weight") and _layer_of(entry) in _SPLIT_DIM
