"""torch_dist checkpoints written and read one weight at a time, by one process, and writing resumed after a kill.

The files are those of megatron-core's own strategy: a file of tensors for every layer, and ``.metadata`` that says
where each lies. A layer's file counts once the record of what is in it stands beside it.
"""

from __future__ import annotations

import io
import math
import pickle
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, LoadPlan, SavePlan
from torch.distributed.checkpoint.default_planner import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    create_default_global_save_plan,
)
from torch.distributed.checkpoint.filesystem import _StoragePrefix
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_rlvr.atomic_write import write_bytes
from megatron_rlvr.errors import UserError
from megatron_rlvr.training.checkpoint import DiskWriter

Pieces = Callable[[str], list[ShardedTensor]]
"""Gives a weight by name, as the checkpoint holds it, with its data."""
_RECORD = "layer-{}.record"


class StreamedSave(TorchDistSaveShardedStrategy):
    """megatron-core's torch_dist format from a state dict without data, which comes weight by weight.

    Args:
        pieces: called for every weight once, in order; what is held at once is one weight.
        tell: hears how many of the checkpoint's files are whole, and of how many.
    """

    def __init__(self, pieces: Pieces, tell: Callable[[int, int], None]):
        super().__init__("torch_dist", 1, thread_count=1)
        self.pieces, self.tell = pieces, tell

    def save(self, sharded_state_dict: dict, checkpoint_dir: str | Path) -> None:
        """Write what is not there yet. `sharded_state_dict` is {"model": weights by name}."""
        folder = Path(checkpoint_dir)
        state = sharded_state_dict["model"]
        items = [item for name, entry in state.items() for item in _write_items(entry)]
        names = [name for name, entry in state.items() for _ in _write_items(entry)]
        [plan], metadata = create_default_global_save_plan([SavePlan(items)])
        layers: dict[str, list[int]] = {}
        for number, name in enumerate(names):
            found = re.match(r"decoder\.layers\.\d+\.", name)
            layers.setdefault(found[0] if found else name, []).append(number)
        writer = DiskWriter(folder, thread_count=1, sync_files=True, per_thread_copy_ahead=0)
        written = []
        for layer, numbers in enumerate(layers.values()):
            record = folder / _RECORD.format(layer)
            if not record.is_file():
                part = SavePlan([plan.items[i] for i in numbers], storage_data=_StoragePrefix(f"__{layer}_"))
                planner = _OneByOne(self.pieces, {plan.items[i].index: names[i] for i in numbers}, state)
                results = writer.write_data(part, planner).wait()
                write_bytes(record, pickle.dumps(results))
            written.append(pickle.loads(record.read_bytes()))
            self.tell(layer + 1, len(layers))
        writer.finish(metadata, written)
        for layer in range(len(layers)):
            (folder / _RECORD.format(layer)).unlink()


def _write_items(entry: Any) -> list[WriteItem]:
    """What the checkpoint holds of a weight (a tensor or a list of them) or of a module's extra state."""
    if isinstance(entry, list):
        return [item for one in entry for item in _write_items(one)]
    if isinstance(entry, ShardedObject):
        return [WriteItem(MetadataIndex(entry.unique_key), WriteItemType.BYTE_IO)]
    chunk = _chunk(entry)
    properties = TensorProperties(dtype=entry.dtype)
    data = TensorWriteData(chunk, properties, torch.Size(entry.global_shape))
    return [WriteItem(MetadataIndex(entry.key, chunk.offsets), WriteItemType.SHARD, tensor_data=data)]


def _chunk(piece: ShardedTensor) -> ChunkStorageMetadata:
    """Where a piece lies in its tensor, which is one for all layers."""
    shape = (1,) * piece.prepend_axis_num + tuple(piece.local_shape)
    return ChunkStorageMetadata(offsets=torch.Size(piece.global_offset), sizes=torch.Size(shape))


class _OneByOne(DefaultSavePlanner):
    """Answers torch's writer, which asks for one item after the other, from weights made when the first of them is."""

    def __init__(self, pieces: Pieces, names: dict[MetadataIndex, str], state: dict[str, ShardedBase]):
        super().__init__()
        self.pieces, self.names, self.state = pieces, names, state
        self.held: tuple[str, list[ShardedTensor]] = ("", [])

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        name = self.names[write_item.index]
        if write_item.type == WriteItemType.BYTE_IO:
            packed = io.BytesIO()
            torch.save([self.state[name].data], packed)
            return packed
        if self.held[0] != name:
            self.held = ("", [])  # let go of the one before first
            self.held = (name, self.pieces(name))
        [piece] = [p for p in self.held[1] if torch.Size(p.global_offset) == write_item.index.offset]
        return piece.data.detach().view(_chunk(piece).sizes)


class StreamedLoad:
    """Reads single weights of a torch_dist checkpoint, whichever layout it was written in.

    Raises:
        UserError: when the checkpoint cannot be opened.
    """

    def __init__(self, folder: Path):
        self.folder, self.reader = folder, FileSystemReader(folder)
        try:
            self.metadata = self.reader.read_metadata()
        except (OSError, EOFError, pickle.UnpicklingError) as error:
            raise UserError(f"{folder} cannot be read: {reason(error)}") from error
        self.reader.set_up_storage_reader(self.metadata, is_coordinator=True)

    def fill(self, pieces: Iterable[ShardedTensor]) -> None:
        """Fill the data of `pieces` from the checkpoint; rows that a layout padded the vocabulary with stay unread.

        Raises:
            UserError: when a tensor is missing, smaller than asked for, or cannot be read.
        """
        for piece in pieces:
            stored = self.metadata.state_dict_metadata.get(piece.key)
            if not isinstance(stored, TensorStorageMetadata):
                raise UserError(f"{self.folder} cannot be read: it lacks {piece.key}")
            chunk = _chunk(piece)
            items = create_read_items_for_chunk_list(piece.key, stored, [chunk])
            if sum(math.prod(item.lengths) for item in items) != math.prod(chunk.sizes):
                raise UserError(f"{self.folder} cannot be read: it holds a part of {piece.key} only")
            if stored.properties.dtype != piece.data.dtype:
                raise UserError(f"{self.folder} cannot be read: {piece.key} is {stored.properties.dtype} there")
            try:
                self.reader.read_data(LoadPlan(items), _Into(piece.data.view(chunk.sizes)))
            except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
                raise UserError(f"{self.folder} cannot be read: {reason(error)}") from error


class _Into(DefaultLoadPlanner):
    """Puts what torch's reader has read into one tensor."""

    def __init__(self, target: Tensor):
        super().__init__()
        self.target = target

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        where = tuple(
            slice(start, start + length)
            for start, length in zip(read_item.dest_offsets, read_item.lengths, strict=True)
        )
        return self.target[where]

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """Nothing is left to do: it was read into its place."""


def reason(error: BaseException) -> str:
    """An error in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
