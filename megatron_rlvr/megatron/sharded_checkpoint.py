"""Checkpoints in megatron-core's torch_dist format, which all processes of a job write and any layout can read."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import torch as torch_dist
from megatron.core.optimizer import MegatronOptimizer
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint import save as save_torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner

from megatron_rlvr.checksums import hashing_file
from megatron_rlvr.errors import first_line, truncated
from megatron_rlvr.megatron import lora_state, optimizer_state, waiting
from megatron_rlvr.megatron.flat_slices import FlatSlice, SavePlannerWithSlices, read_slices
from megatron_rlvr.megatron.model import PolicyModel

SAVE_ERRORS = (OSError, CheckpointException)
"""Exceptions of `save`, and of the future that it returns, if files cannot be written."""
LOAD_ERRORS = (Exception, CheckpointException)
"""Exceptions of `load` if files are missing or damaged: of damaged pickles and archives, any kind."""


@dataclass
class TrainingState:
    """What a checkpoint contains.

    Attributes:
        described: megatron-core's sharded state dict; after `load`, with tensors.
        slots: what this rank holds of a distributed optimizer; see `optimizer_state.sharded_state`.
        slices: the slices of stored tensors that `slots` consist of.
    """

    described: dict[str, Any]
    slots: list[optimizer_state.Slots] = field(default_factory=list)
    slices: list[FlatSlice] = field(default_factory=list)


def save(
    state: TrainingState,
    folder: Path,
    *,
    group: dist.ProcessGroup | None = None,
    background: Executor | None = None,
) -> Future[dict[str, str]]:
    """Write a checkpoint. Collective over the job, whose ranks exchange no tensors.

    Args:
        state: result of `training_state`.
        folder: an existing empty folder.
        group: group for the exchange at the start and the end of a save; None means the group of waiting processes.
        background: executor that writes copies of the tensors in host memory, while this function returns at once.
            `group` must then be used for nothing else, because its collectives run on another thread.

    Returns:
        the future of the write; without `background`, it is done. Its result are the checksums of the files that this
        process has written, by name.

    Raises:
        SAVE_ERRORS: if files cannot be written.
    """
    strategy = _DirectSave(group, background, state.slices)
    with waiting.as_default_group():
        dist_checkpointing.save(state.described, str(folder), sharded_strategy=strategy)
    return strategy.writing


def load(state: TrainingState, folder: Path) -> TrainingState:
    """Read a checkpoint. Collective over the job, whose ranks exchange no tensors.

    Args:
        state: result of `training_state` with ``loading=True``.
        folder: folder of the checkpoint.

    Returns:
        `state` with tensors instead of their descriptions, and with slots filled.

    Raises:
        LOAD_ERRORS: on every process, if the checkpoint is damaged or incomplete.
    """
    with waiting.as_default_group():
        loaded = dist_checkpointing.load(state.described, str(folder))
    error: BaseException | None = None
    try:
        read_slices(folder, state.slices)
    except LOAD_ERRORS as failure:
        error = failure
    if waiting.any_rank(error is not None, f"every rank to read {folder}"):
        raise error or OSError("another process could not read it")
    return replace(state, described=loaded)


def training_state(
    model_chunks: Sequence[PolicyModel], optimizer: MegatronOptimizer | None, *, loading: bool
) -> TrainingState:
    """Return a description of the training state, for `save` or `load`. Collective over the job.

    Without an optimizer, it is the model alone: loading then reads no optimizer state. Of a model with adapters, it is
    the adapters: the other weights are those of a folder.
    """
    model = {
        _chunk_key(number): lora_state.sharded_state(chunk) if chunk.adapted else chunk.sharded_state_dict()
        for number, chunk in enumerate(model_chunks)
    }
    if optimizer is None:
        return TrainingState(model)
    state, slots, slices = optimizer_state.sharded_state(optimizer, model, loading)
    return TrainingState(model | {"optimizer": state}, slots, slices)


def load_training_state(
    model_chunks: Sequence[PolicyModel], optimizer: MegatronOptimizer | None, state: TrainingState
) -> None:
    """Load the result of `load` into the model chunks and the optimizer, if it is not None.

    Raises:
        UserError: if the optimizer state differs from the loaded state afterwards.
    """
    for number, chunk in enumerate(model_chunks):
        loaded = state.described[_chunk_key(number)]
        if chunk.adapted:
            lora_state.load(chunk, loaded)
        else:
            chunk.load_state_dict(loaded)
    if optimizer is not None:
        optimizer_state.load(optimizer, state.described["optimizer"], state.slots)


def _chunk_key(number: int) -> str:
    # The key is not stored: tensors are named by their place in the model, however many chunks it has.
    return f"model{number}" if number else "model"


def root_cause(error: BaseException) -> str:
    """Return the innermost cause of an error in one line; torch wraps errors of the disk in a traceback per rank."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    while error.__cause__ is not None:
        error = error.__cause__
    return truncated(first_line(error), 300)


class _HashingFileSystem(FileSystem):
    """torch's access to files, with the checksum of every file of tensors that is written."""

    def __init__(self) -> None:
        self.digests: dict[str, str] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[Any]:
        if mode != "wb":
            with super().create_stream(path, mode) as stream:
                yield stream
            return
        with hashing_file(Path(path)) as file:
            yield file
        if Path(path).suffix == ".distcp":  # torch writes the metadata under another name first
            self.digests[Path(path).name] = file.digest()


class DiskWriter(FileSystemWriter):
    """torch's writer of checkpoint files, with their checksums, and with the original OSError.

    torch.save converts "No space left on device" to an error about positions in its archive.

    Attributes:
        digests: checksums of the files that `write_data` has completed, by name.
    """

    def __init__(self, folder: str | Path, **options: Any):
        super().__init__(folder, **options)
        self.fs = _HashingFileSystem()
        self.digests = self.fs.digests

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Any:
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__cause__ or cause.__context__
            raise cause or error from None


class _DirectSave(torch_dist.TorchDistSaveShardedStrategy):
    """Writes the torch_dist format from this process.

    megatron-core's writer starts a manager and a child process for every save, which takes seconds before anything is
    written. The files are the same.
    """

    def __init__(self, group: dist.ProcessGroup | None, background: Executor | None, slices: Sequence[FlatSlice]):
        super().__init__("torch_dist", 1, thread_count=1)
        self.group, self.background, self.slices = group, background, slices
        self.writing: Future[dict[str, str]] = Future()

    def save(self, sharded_state_dict: dict, checkpoint_dir: str | Path) -> None:
        flat, _, _ = torch_dist._replace_state_dict_keys_with_sharded_keys(
            sharded_state_dict, self.keep_only_main_replica
        )
        slices = self.slices
        if self.background is not None:
            for shards in flat.values():
                for shard in shards:
                    is_tensor = torch.is_tensor(shard.data)
                    shard.data = shard.data.detach().to("cpu", copy=True) if is_tensor else copy.deepcopy(shard.data)
            slices = [replace(part, data=part.data.to("cpu", copy=True)) for part in slices if part.is_written]
        writer = DiskWriter(checkpoint_dir, thread_count=self.thread_count, sync_files=True)
        arguments = {
            "storage_writer": writer,
            "planner": SavePlannerWithSlices(
                slices, dedup_replicated_tensors=not self.keep_only_main_replica, flatten_state_dict=False
            ),
            "process_group": self.group,
        }
        state = torch_dist.mcore_to_pyt_state_dict(flat, False)

        def write() -> dict[str, str]:
            save_torch(state, **arguments)
            return writer.digests

        if self.background is None:
            self.writing.set_result(write())
        else:
            self.writing = self.background.submit(write)
