"""The Hugging Face tensors of the whole model, one at a time, from the weights of all ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_rlvr.megatron import device
from megatron_rlvr.megatron.families import Family
from megatron_rlvr.megatron.families.weight_map import Plain, Vocabulary, WeightMap
from megatron_rlvr.megatron.huggingface_config import is_tied
from megatron_rlvr.megatron.lora import adapters_of
from megatron_rlvr.megatron.lora_layers import Adapter
from megatron_rlvr.megatron.model import PolicyModel
from megatron_rlvr.megatron.weight_loading import OUTPUT
from megatron_rlvr.megatron.weight_shards import Shard, shards


@dataclass(frozen=True)
class Source:
    """A tensor of this rank that an export reads.

    Attributes:
        shard: the tensor, and which shard of the whole it is.
        entry: how it maps to Hugging Face tensors.
        names: names of these tensors, for each expert-parallel rank; one list if it is not of an expert.
        adapters: the adapter of each of these tensors, which the export merges into it; [] if there are none.
    """

    shard: Shard
    entry: WeightMap
    names: list[list[str]]
    adapters: list[Adapter | None]

    def parts(self, hf_config: Any) -> list[Tensor]:
        """Return this rank's shards of the Hugging Face tensors, merged with their adapters."""
        weight = self.shard.weight.detach()
        parts = self.entry.to_huggingface(weight, hf_config)
        for number, adapter in enumerate(self.adapters):
            if adapter is not None:
                parts[number] = adapter.merged(parts[number])
        return parts


def weight_sources(model_chunks: Sequence[PolicyModel], family: Family, hf_config: Any) -> list[Source]:
    """Return the weights of this rank. Adapters are merged into them: ``W + alpha / rank * B A``."""
    tied = is_tied(hf_config)
    return [
        Source(shard, entry, names, adapters_of(shard))
        for shard in shards(model_chunks)
        if not (tied and shard.name == OUTPUT)  # the first stage exports a tied embedding
        for entry, names in [_names_by_rank(shard, family)]
    ]


def adapter_sources(model_chunks: Sequence[PolicyModel], family: Family) -> list[Source]:
    """Return the tensors of the adapters of this rank, by their names in PEFT, less its prefix."""
    sources = []
    for shard in shards(model_chunks):
        _, names = _names_by_rank(shard, family)
        for number, adapter in enumerate(adapters_of(shard)):
            for key, tensor, dim in adapter.tensors() if adapter is not None else ():
                last = key.removeprefix(adapter.module_name)  # type: ignore[union-attr]
                keys = [[of_rank[number].removesuffix(".weight") + last] for of_rank in names]
                sources.append(Source(replace(shard, name=key, weight=tensor, dim=dim), Plain(key, key), keys, []))
    return sources


def _names_by_rank(shard: Shard, family: Family) -> tuple[WeightMap, list[list[str]]]:
    ranks = parallel_state.get_expert_model_parallel_world_size() if shard.expert is not None else 1
    found = [family.table.find(shard.name_on(rank)) for rank in range(ranks)]
    return found[0][0], [names for _, names in found]


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
    """Gathers tensors of all ranks. Collective over the job; the one exchange of objects is in the constructor.

    Per weight, an export costs an all-gather over the ranks that split it, for experts one over the expert-parallel
    ranks, and a broadcast from its pipeline stage to the others.

    Args:
        sources: what this rank contributes: `weight_sources` or `adapter_sources`.
        hf_config: transformers configuration of the model.

    Attributes:
        weights: every weight, in the order of the export; the same on all ranks.
    """

    def __init__(self, sources: Sequence[Source], hf_config: Any):
        self._hf_config, self._sources = hf_config, sources
        self._expert_group = parallel_state.get_expert_model_parallel_group()
        self._stages = parallel_state.get_pipeline_model_parallel_group()
        own = []
        for index, source in enumerate(sources):
            shard, entry = source.shard, source.entry
            shapes = [list(part.shape) for part in entry.to_huggingface(shard.weight.detach(), hf_config)]
            for shape in shapes:
                if shard.dim is not None:
                    shape[shard.dim] *= shard.group.size()
                if isinstance(entry, Vocabulary):
                    shape[0] = hf_config.vocab_size
            own.append(ExportedWeight(self._stages.rank(), index, source.names, shapes, shard.weight.dtype))
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
        source = self._sources[weight.index]
        shard, parts = source.shard, source.parts(self._hf_config)
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
