"""Flat slices of tensors in a torch_dist checkpoint.

A rank of the distributed optimizer holds a slice of a flattened parameter, which is no rectangle of the parameter. But
a slice divides into a few rectangles, and the format stores a tensor as rectangles of any sizes. So every rank writes
what it holds and reads what it needs, in any layout. Nothing is gathered.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory, is_main_replica
from megatron.core.dist_checkpointing.strategies.torch import MCoreSavePlanner
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list


@dataclass
class FlatSlice:
    """A slice of a tensor's local shard, flattened.

    Attributes:
        shard: megatron-core's description of the shard, without data: its place in the stored tensor.
        start: first element of the slice in the flattened shard.
        data: the elements [n].
    """

    shard: ShardedTensor
    start: int
    data: Tensor

    @property
    def is_written(self) -> bool:
        """Whether this rank writes the slice. Of the ranks with the same shard, one per data-parallel rank does."""
        return is_main_replica((*self.shard.replica_id[:-1], 0))

    def rectangles(self) -> Iterator[tuple[ChunkStorageMetadata, Tensor]]:
        """Yield each rectangle of the stored tensor that the slice covers, with its elements, a view of `data`."""
        prepended = self.shard.prepend_axis_num  # axes of the stored tensor that stack layers or experts
        position = 0
        for offsets, sizes in rectangles(self.shard.local_shape, self.start, self.start + len(self.data)):
            place = torch.Size(a + b for a, b in zip(self.shard.global_offset, (0,) * prepended + offsets, strict=True))
            whole = torch.Size((1,) * prepended + sizes)
            count = math.prod(sizes)
            yield ChunkStorageMetadata(place, whole), self.data[position : position + count].view(whole)
            position += count


def rectangles(shape: Sequence[int], start: int, end: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Divide the elements [start, end) of a flattened tensor into rectangles, at most 2 n - 1 in n dimensions.

    Yields:
        offsets and sizes of a rectangle, whose elements follow one another in the flattened tensor; in their order.
    """
    if start >= end:
        return
    if len(shape) <= 1:
        yield ((start,), (end - start,)) if shape else ((), ())
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), end // row  # the rows that lie wholly within
    if first > last:
        pieces = [(last, start, end)]  # within one row
    else:
        pieces = [(first - 1, start, first * row), (last, last * row, end)]
    for number, (index, begin, stop) in enumerate(pieces):
        if number and last > first:
            yield (first, *(0 for _ in shape[1:])), (last - first, *shape[1:])
        for offsets, sizes in rectangles(shape[1:], begin - index * row, stop - index * row):
            yield (index, *offsets), (1, *sizes)


def slices_of(entry: ShardedTensor | ShardedTensorFactory, key: str, start: int, data: Tensor) -> Iterator[FlatSlice]:
    """Yield the slices of stored tensors that a slice of a parameter's local shard consists of.

    Args:
        entry: megatron-core's description of the parameter. A factory divides it into several stored tensors, such as
            the gate and the up projection.
        key: name of the stored tensor.
        start: first element of the slice in the flattened shard.
        data: its elements [n], whose dtype is the stored one.

    Raises:
        NotImplementedError: if a factory reorders the elements of the parameter.
    """
    whole = torch.empty(entry.data.shape, dtype=data.dtype, device="meta")  # stands for the parameter; holds nothing
    if isinstance(entry, ShardedTensorFactory):
        pieces = list(nested_values([replace(entry, key=key, data=whole).build()]))
    else:
        pieces = [replace(entry, key=key, data=whole, dtype=data.dtype)]
    if sum(piece.data.numel() for piece in pieces) != whole.numel():
        raise NotImplementedError(f"{key} is not stored once")
    for piece in pieces:
        if not piece.data.is_contiguous() or (piece.data is not whole and piece.data._base is not whole):
            raise NotImplementedError(f"{key} is stored in another order than the parameter")
        offset = piece.data.storage_offset()
        begin, stop = max(start, offset), min(start + len(data), offset + piece.data.numel())
        if begin < stop:
            yield FlatSlice(replace(piece, data=None), begin - offset, data[begin - start : stop - start])


class SavePlannerWithSlices(MCoreSavePlanner):
    """megatron-core's planner of a save, with flat slices in addition to the state dict.

    torch checks the plan of all ranks: every stored tensor must be covered exactly once.
    """

    def __init__(self, slices: Iterable[FlatSlice], **options: Any):
        super().__init__(**options)
        self.slices = slices
        self.rectangles: dict[MetadataIndex, Tensor] = {}

    def create_local_plan(self) -> SavePlan:
        """Plan the rectangles of the slices that this rank writes, after its shards of the state dict."""
        plan = super().create_local_plan()
        items = list(plan.items)
        for part in self.slices:
            size, properties = torch.Size(part.shard.global_shape), TensorProperties(dtype=part.data.dtype)
            for chunk, data in part.rectangles() if part.is_written else ():
                index = MetadataIndex(part.shard.key, chunk.offsets)
                self.rectangles[index] = data
                items.append(
                    WriteItem(index, WriteItemType.SHARD, tensor_data=TensorWriteData(chunk, properties, size))
                )
        self.plan = replace(plan, items=items)
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Any:
        """Return the data of an item."""
        data = self.rectangles.get(write_item.index)
        return super().resolve_data(write_item) if data is None else data


def read_slices(folder: Path, slices: Iterable[FlatSlice]) -> None:
    """Read slices from a checkpoint in place, whatever layout wrote it. This process reads alone.

    Besides the slices, it holds one stored rectangle at a time.

    Raises:
        ValueError: if the checkpoint lacks a tensor, or has it in another shape or dtype.
    """
    reader = FileSystemReader(folder)
    metadata = reader.read_metadata()
    reader.set_up_storage_reader(metadata, is_coordinator=True)
    items: list[ReadItem] = []
    targets: dict[MetadataIndex, Tensor] = {}
    for part in slices:
        key, rectangles_of_part = part.shard.key, list(part.rectangles())
        stored = _checked(metadata.state_dict_metadata.get(key), part)
        items += create_read_items_for_chunk_list(key, stored, [chunk for chunk, _ in rectangles_of_part])
        targets |= {MetadataIndex(key, chunk.offsets): data for chunk, data in rectangles_of_part}
    reader.read_data(LoadPlan(items), _ReadInto(targets))


def _checked(stored: Any, part: FlatSlice) -> TensorStorageMetadata:
    key, shape = part.shard.key, tuple(part.shard.global_shape)
    if not isinstance(stored, TensorStorageMetadata):
        raise ValueError(f"it lacks {key}")
    if tuple(stored.size) != shape and not part.shard.allow_shape_mismatch:  # the padding of a vocabulary may differ
        raise ValueError(f"{key} has shape {tuple(stored.size)} instead of {shape}")
    if stored.properties.dtype != part.data.dtype:
        raise ValueError(f"{key} is {stored.properties.dtype} instead of {part.data.dtype}")
    return stored


class _ReadInto(DefaultLoadPlanner):
    """Makes torch's reader write into given tensors."""

    def __init__(self, targets: dict[MetadataIndex, Tensor]):
        super().__init__()
        self.targets = targets

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self.targets[index]
