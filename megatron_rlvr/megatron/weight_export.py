"""The Hugging Face tensors of the whole model, one at a time, from the weights of all ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_rlvr.megatron import device
from megatron_rlvr.megatron.families import Family
from megatron_rlvr.megatron.families.weight_map import Vocabulary, WeightMap
from megatron_rlvr.megatron.huggingface_config import is_tied
from megatron_rlvr.megatron.model import PolicyModel
from megatron_rlvr.megatron.weight_loading import OUTPUT
from megatron_rlvr.megatron.weight_shards import shards


@dataclass(frozen=True)
class ExportedWeight:
    """A weight of the model, as every rank knows it.

    Attributes:
        stage: the pipeline rank that holds it.
        index: its position among the weights of that rank.
        names: names of its Hugging Face tensors, for each expert-parallel rank; one list if it is not of an expert.
        shapes: shapes of these tensors in the whole model.
        dtype: dtype of the tensors.
    """

    stage: int
    index: int
    names: list[list[str]]
    shapes: list[list[int]]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        """Elements of the tensors of one expert-parallel rank."""
        return sum(torch.Size(shape).numel() for shape in self.shapes)


class WeightExport:
    """Gathers the weights of a model. Collective over the job; the one exchange of objects is in the constructor.

    Per weight, an export costs an all-gather over the ranks that split it, for experts one over the expert-parallel
    ranks, and a broadcast from its pipeline stage to the others.

    Args:
        model_chunks: this rank's model chunks.
        family, hf_config: family and transformers configuration of the model.

    Attributes:
        weights: every weight, in the order of the export; the same on all ranks.
    """

    def __init__(self, model_chunks: Sequence[PolicyModel], family: Family, hf_config: Any):
        self._hf_config = hf_config
        self._expert_group = parallel_state.get_expert_model_parallel_group()
        self._stages = parallel_state.get_pipeline_model_parallel_group()
        stage, tied = self._stages.rank(), is_tied(hf_config)
        # The first stage exports a tied embedding.
        self._shards = [shard for shard in shards(model_chunks) if not (tied and shard.name == OUTPUT)]
        self._entries: list[WeightMap] = []
        own = []
        for index, shard in enumerate(self._shards):
            ranks = range(self._expert_group.size()) if shard.expert is not None else range(1)
            found = [family.table.find(shard.name_on(rank)) for rank in ranks]
            entry = found[0][0]
            self._entries.append(entry)
            shapes = [list(part.shape) for part in entry.to_huggingface(shard.weight.detach(), hf_config)]
            for shape in shapes:
                if shard.dim is not None:
                    shape[shard.dim] *= shard.group.size()
                if isinstance(entry, Vocabulary):
                    shape[0] = hf_config.vocab_size
            own.append(ExportedWeight(stage, index, [names for _, names in found], shapes, shard.weight.dtype))
        by_stage: list[list[ExportedWeight]] = [[] for _ in range(self._stages.size())]
        dist.all_gather_object(by_stage, own, group=self._stages)
        self.weights = [weight for of_stage in by_stage for weight in of_stage]

    def described(self) -> Iterator[tuple[str, torch.dtype, torch.Size]]:
        """Yield name, dtype and shape of every tensor, in the order of `tensors`."""
        for weight in self.weights:
            for names in weight.names:
                for name, shape in zip(names, weight.shapes, strict=True):
                    yield name, weight.dtype, torch.Size(shape)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every Hugging Face tensor, complete, on every process. Tensors are valid until the next one."""
        with torch.no_grad():
            for weight in self.weights:
                yield from self._gather(weight)

    def _gather(self, weight: ExportedWeight) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors of a weight. Its ranks hold all of it before the first is yielded."""
        holder = weight.stage == self._stages.rank()
        if holder:
            flat = self._gather_experts(weight, self._gather_shards(weight))
        else:
            flat = torch.empty(len(weight.names) * weight.numel, dtype=weight.dtype, device=device.device())
        if self._stages.size() > 1:
            dist.broadcast(flat, dist.get_global_rank(self._stages, weight.stage), group=self._stages)
        sizes = [torch.Size(shape).numel() for shape in weight.shapes]
        for names, of_rank in zip(weight.names, flat.split(weight.numel), strict=True):
            for name, part, shape in zip(names, of_rank.split(sizes), weight.shapes, strict=True):
                yield name, part.view(shape)

    def _gather_shards(self, weight: ExportedWeight) -> Tensor:
        """Return the Hugging Face tensors of this expert-parallel rank's weight, whole and end to end."""
        shard, entry = self._shards[weight.index], self._entries[weight.index]
        parts = entry.to_huggingface(shard.weight.detach(), self._hf_config)
        if shard.dim is not None:
            own = torch.cat([part.flatten() for part in parts])
            ranks = own.new_empty(shard.group.size(), own.numel())
            dist.all_gather(list(ranks), own, group=shard.group)
            sizes = [part.numel() for part in parts]
            by_part = zip(*(rank.split(sizes) for rank in ranks), strict=True)
            parts = [
                torch.cat([piece.view(part.shape) for piece in pieces], dim=shard.dim)
                for part, pieces in zip(parts, by_part, strict=True)
            ]
        return torch.cat([part[: shape[0]].flatten() for part, shape in zip(parts, weight.shapes, strict=True)])

    def _gather_experts(self, weight: ExportedWeight, own: Tensor) -> Tensor:
        if len(weight.names) == 1:
            return own
        ranks = own.new_empty(len(weight.names), own.numel())
        dist.all_gather(list(ranks), own, group=self._expert_group)
        return ranks.flatten()
