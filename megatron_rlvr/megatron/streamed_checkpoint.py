"""Write and read torch_dist checkpoints one weight at a time, in one process. Writing resumes after a kill.

The format is megatron-core's: files of tensors, here one per layer, and ``.metadata``, which contains the
location of each tensor. The file of a layer counts as complete once the record of its contents exists next to it.
"""

from __future__ import annotations

import copy
import hashlib
import io
import logging
import math
import pickle
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedObject, ShardedTensor, ShardedTensorFactory
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
from megatron_rlvr.megatron.sharded_checkpoint import DiskWriter, root_cause

Pieces = Callable[[str], list[ShardedTensor]]
"""Returns a weight by name, with its data, as the pieces that the checkpoint stores."""
_RECORD = "layer-{}.record"

# megatron-core warns that the folder is an incomplete checkpoint of an old format, because the last file is missing.
logging.getLogger("megatron.core.dist_checkpointing.serialization").setLevel(logging.ERROR)


def save_streamed(
    state: Mapping[str, ShardedBase], folder: Path, pieces: Pieces, report: Callable[[int, int], None]
) -> dict[str, str]:
    """Write the weights of a model with one weight in memory at a time; skips files that an earlier call completed.

    Args:
        state: megatron-core's description of every weight, by its name in the model, without data.
        folder: an existing folder: empty, or written to by an interrupted call with the same weights.
        pieces: returns the data of a weight; called once per weight, in order.
        report: called with the number of complete files and the total number of files.

    Returns:
        the checksums of the files of weights, by name.

    Raises:
        OSError: if a file cannot be written.
    """
    strategy = _StreamedSave(pieces, report)
    dist_checkpointing.save({"model": dict(state)}, str(folder), sharded_strategy=strategy)
    return strategy.digests


def split_into_pieces(entry: ShardedBase, weight: Tensor) -> list[ShardedTensor]:
    """Split a weight into the pieces that the checkpoint stores: one, or the gate and the up projection, as views."""
    entry = copy.copy(entry)
    entry.data = weight
    if isinstance(entry, ShardedTensorFactory):
        return entry.build()
    assert isinstance(entry, ShardedTensor)
    return [entry]


class _StreamedSave(TorchDistSaveShardedStrategy):
    """Writes the torch_dist format layer by layer; skips layers whose record exists."""

    def __init__(self, pieces: Pieces, report: Callable[[int, int], None]):
        super().__init__("torch_dist", 1, thread_count=1)
        self.pieces, self.report = pieces, report
        self.digests: dict[str, str] = {}

    def save(self, sharded_state_dict: dict, checkpoint_dir: str | Path) -> None:
        folder = Path(checkpoint_dir)
        state = sharded_state_dict["model"]
        items = [item for entry in state.values() for item in _write_items(entry)]
        names = [name for name, entry in state.items() for _ in _write_items(entry)]
        [plan], metadata = create_default_global_save_plan([SavePlan(items)])
        items_of_layer: dict[str, list[int]] = {}
        for number, name in enumerate(names):
            layer = re.match(r"decoder\.layers\.\d+\.", name)
            items_of_layer.setdefault(layer[0] if layer else name, []).append(number)
        writer = DiskWriter(folder, thread_count=1, sync_files=True, per_thread_copy_ahead=0)
        written = []
        for layer_number, item_numbers in enumerate(items_of_layer.values()):
            record = folder / _RECORD.format(layer_number)
            completed = _read_record(record)
            if completed is None:
                layer_items = [plan.items[i] for i in item_numbers]
                planner = _OneByOne(self.pieces, {plan.items[i].index: names[i] for i in item_numbers}, state)
                layer_plan = SavePlan(layer_items, storage_data=_StoragePrefix(f"__{layer_number}_"))
                writer.digests.clear()
                completed = writer.write_data(layer_plan, planner).wait(), dict(writer.digests)
                _write_record(record, completed)
            written.append(completed[0])
            self.digests |= completed[1]
            self.report(layer_number + 1, len(items_of_layer))
        writer.finish(metadata, written)
        for layer_number in range(len(items_of_layer)):
            (folder / _RECORD.format(layer_number)).unlink()


def _write_record(path: Path, record: tuple[Any, dict[str, str]]) -> None:
    data = pickle.dumps(record)
    write_bytes(path, hashlib.sha256(data).digest() + data)


def _read_record(path: Path) -> tuple[Any, dict[str, str]] | None:
    """Return torch's results and the checksums of a complete file; None if there is no intact record of it."""
    with suppress(FileNotFoundError):
        content = path.read_bytes()
        if hashlib.sha256(content[32:]).digest() == content[:32]:
            return pickle.loads(content[32:])
    return None


def _write_items(entry: Any) -> list[WriteItem]:
    """Return what the checkpoint stores for a weight (one tensor or a list of them) or for a module's extra state."""
    if isinstance(entry, list):
        return [item for tensor in entry for item in _write_items(tensor)]
    if isinstance(entry, ShardedObject):
        return [WriteItem(MetadataIndex(entry.unique_key), WriteItemType.BYTE_IO)]
    chunk = _chunk(entry)
    properties = TensorProperties(dtype=entry.dtype)
    data = TensorWriteData(chunk, properties, torch.Size(entry.global_shape))
    return [WriteItem(MetadataIndex(entry.key, chunk.offsets), WriteItemType.SHARD, tensor_data=data)]


def _chunk(piece: ShardedTensor) -> ChunkStorageMetadata:
    """Return offsets and sizes of a piece in its stored tensor, which stacks all layers."""
    shape = (1,) * piece.prepend_axis_num + tuple(piece.local_shape)
    return ChunkStorageMetadata(offsets=torch.Size(piece.global_offset), sizes=torch.Size(shape))


class _OneByOne(DefaultSavePlanner):
    """Passes one item at a time to torch's writer. A weight is computed when the writer requests its first piece."""

    def __init__(self, pieces: Pieces, names: dict[MetadataIndex, str], state: dict[str, ShardedBase]):
        super().__init__()
        self.pieces, self.names, self.state = pieces, names, state
        self.current_name = ""
        self.current_pieces: list[ShardedTensor] = []

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        name = self.names[write_item.index]
        if write_item.type == WriteItemType.BYTE_IO:
            packed = io.BytesIO()
            torch.save([self.state[name].data], packed)
            return packed
        if self.current_name != name:
            self.current_pieces, self.current_name = [], ""  # free the previous weight first
            self.current_pieces, self.current_name = self.pieces(name), name
        [piece] = [p for p in self.current_pieces if torch.Size(p.global_offset) == write_item.index.offset]
        return piece.data.detach().view(_chunk(piece).sizes)


class StreamedLoad:
    """Reads single weights of a torch_dist checkpoint, whatever layout wrote it.

    Raises:
        UserError: if the checkpoint cannot be opened.
    """

    def __init__(self, folder: Path):
        self.folder, self.reader = folder, FileSystemReader(folder)
        try:
            self.metadata = self.reader.read_metadata()
        except Exception as error:  # of a damaged pickle, any kind
            raise UserError(f"{folder} cannot be read: {root_cause(error)}") from error
        self.reader.set_up_storage_reader(self.metadata, is_coordinator=True)

    def tensor_names(self) -> list[str]:
        """Return the names of the stored tensors."""
        stored = self.metadata.state_dict_metadata
        return [name for name, entry in stored.items() if isinstance(entry, TensorStorageMetadata)]

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """Return a whole stored tensor, which must have this dtype; raises as `fill`."""
        stored = self.metadata.state_dict_metadata[name]
        assert isinstance(stored, TensorStorageMetadata)
        piece = ShardedTensor.from_rank_offsets(name, torch.empty(stored.size, dtype=dtype))
        self.fill([piece])
        return piece.data

    def fill(self, pieces: Iterable[ShardedTensor]) -> None:
        """Read the data of `pieces` from the checkpoint in place. Rows that pad the vocabulary are not read.

        Raises:
            UserError: if a tensor is missing, is smaller than its piece, has another dtype, or cannot be read.
        """
        for piece in pieces:
            stored = self.metadata.state_dict_metadata.get(piece.key)
            if not isinstance(stored, TensorStorageMetadata):
                raise UserError(f"{self.folder} cannot be read: it lacks {piece.key}")
            chunk = _chunk(piece)
            items = create_read_items_for_chunk_list(piece.key, stored, [chunk])
            if sum(math.prod(item.lengths) for item in items) != math.prod(chunk.sizes):
                raise UserError(f"{self.folder} cannot be read: it contains only a part of {piece.key}")
            if stored.properties.dtype != piece.data.dtype:
                raise UserError(
                    f"{self.folder} cannot be read: {piece.key} is {stored.properties.dtype} instead of "
                    f"{piece.data.dtype}"
                )
            try:
                self.reader.read_data(LoadPlan(items), _ReadInto(piece.data.view(chunk.sizes)))
            except Exception as error:  # of a damaged archive or pickle, any kind
                raise UserError(f"{self.folder} cannot be read: {root_cause(error)}") from error


class _ReadInto(DefaultLoadPlanner):
    """Makes torch's reader write into a given tensor."""

    def __init__(self, target: Tensor):
        super().__init__()
        self.target = target

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        index = tuple(
            slice(start, start + length)
            for start, length in zip(read_item.dest_offsets, read_item.lengths, strict=True)
        )
        return self.target[index]

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """Do nothing, because the reader has already written into the target."""
