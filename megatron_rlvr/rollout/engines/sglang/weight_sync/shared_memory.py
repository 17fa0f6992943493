"""Send weights through shared memory to servers on the node of this process."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import os
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing import reductions

from megatron_rlvr.errors import UserError
from megatron_rlvr.megatron import device, waiting
from megatron_rlvr.rollout.engines.sglang.endpoint import ServerLostError
from megatron_rlvr.rollout.engines.sglang.weight_sync.transport import Receiver
from megatron_rlvr.weights.buckets import Bucket

_SHARED_MEMORY = "/dev/shm"

DEVICE_ARGUMENT = 6
"""Position of the GPU's index among the arguments of torch's ``rebuild_cuda_tensor``."""


@dataclass(frozen=True)
class Supply:
    """A server, and the training processes that hand it their copies of the weights.

    Attributes:
        url: URL of the server.
        by_rank: for each rank of the server, the training process whose memory it reads.
        group: the group of these processes; None if it is one process, and on the others.
    """

    url: str
    by_rank: Sequence[int]
    group: dist.ProcessGroup | None

    @property
    def sender(self) -> int:
        """The process that talks to the server."""
        return self.by_rank[0]


class SharedMemoryTransport:
    """See `Transport`. Buckets are in shared memory (CUDA IPC on a GPU), and only their addresses go over HTTP.

    Args:
        supplies: the servers; None for tests of one process, which supplies all ranks of every server.
        rank: rank of this process in the job.
    """

    receivers: Sequence[Receiver] = ()
    _manager_started: ClassVar[bool] = False

    def __init__(self, supplies: Sequence[Supply] | None = None, rank: int = 0):
        self.supplies, self.rank = supplies, rank
        self.holds_buckets = supplies is None or any(rank in supply.by_rank for supply in supplies)

    def allocate(self, size: int) -> Tensor:
        """See `Transport.allocate`; raises UserError if the shared memory of the machine is too small."""
        if device.on_gpu():
            with device.without_expandable_segments():  # the driver must export them as one allocation
                return torch.empty(size, dtype=torch.uint8, device=device.device())
        filesystem = os.statvfs(_SHARED_MEMORY)
        free = filesystem.f_bavail * filesystem.f_frsize
        if size > free:  # otherwise the kernel would kill the process that writes there
            raise UserError(
                f"{_SHARED_MEMORY} has {free >> 20} MiB left, a bucket of weights needs {size >> 20} MiB: lower "
                "rollout.sglang.bucket_mb, or set rollout.sglang.weight_sync=disk"
            )
        with _sharing_by_name(), nullcontext() if self._manager_started else _children_without_stderr():
            SharedMemoryTransport._manager_started = True
            return torch.empty(0, dtype=torch.uint8).set_(torch.UntypedStorage._new_shared(size))

    def share(self, bucket: Bucket) -> None:
        """Bring the addresses of a bucket to the process that talks to each server: one gather per server and
        bucket."""
        device.synchronize()
        if self.supplies is None:
            return
        bucket.shared = {}
        for supply in self.supplies:
            if self.rank not in supply.by_rank:
                continue
            # Serialized once per reader, because each reader releases one reference to the memory.
            own = {n: _serialize(bucket) for n, supplier in enumerate(supply.by_rank) if supplier == self.rank}
            everyone: list[dict[int, str]] | None = [own]
            if supply.group is not None:
                what = f"the addresses of a bucket of weights for {supply.url}"
                everyone = waiting.gather_to(supply.sender, own, supply.group, what)
            if everyone is not None:
                handles = {n: handle for of_process in everyone for n, handle in of_process.items()}
                bucket.shared[supply.url] = [handles[n] for n in range(len(supply.by_rank))]

    async def connect(self, receivers: Sequence[Receiver]) -> None:
        self.receivers = receivers

    async def send(self, bucket: Bucket, fields: dict[str, Any]) -> None:
        commands = []
        for receiver in self.receivers:
            if bucket.shared is None:
                handles = [_serialize(bucket) for _ in range(receiver.ranks)]
            else:
                handles = bucket.shared[receiver.endpoint.url]
            body = {"serialized_named_tensors": handles, "load_format": "flattened_bucket", **fields}
            action = "load weights from shared memory"
            commands.append(receiver.endpoint.command("/update_weights_from_tensor", body, action))
        try:
            await asyncio.gather(*commands)
        except UserError as error:
            raise ServerLostError(str(error)) from error

    def abandon(self) -> None:
        pass

    def close(self) -> None:
        pass


@contextlib.contextmanager
def _sharing_by_name() -> Iterator[None]:
    """Share CPU memory by name, because a server that is not a child of this process crashes on file descriptors."""
    previous_strategy = torch.multiprocessing.get_sharing_strategy()
    torch.multiprocessing.set_sharing_strategy("file_system")
    try:
        yield
    finally:
        torch.multiprocessing.set_sharing_strategy(previous_strategy)


@contextlib.contextmanager
def _children_without_stderr() -> Iterator[None]:
    """Keep this process's stderr from child processes that are started meanwhile.

    The first memory that is shared by name starts torch's torch_shm_manager, which lives as long as any server that
    uses the memory. If it inherited stderr, a reader of this process's output would wait until it has ended, too.
    """
    stderr, devnull = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(devnull, 2)
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(devnull)


class _NamedByUUID:
    """A tensor of a GPU that is pickled with the UUID of the GPU instead of its index.

    The index depends on CUDA_VISIBLE_DEVICES of a process. SGLang accepts both (`_device_from_maybe_uuid` in its
    `patch_torch`), and replaces torch's function that rebuilds the tensor before it reads a bucket.
    """

    def __init__(self, tensor: Tensor):
        self.tensor = tensor

    def __reduce__(self) -> tuple[Any, ...]:
        rebuild, arguments = reductions.reduce_tensor(self.tensor)
        return rebuild, with_uuid(arguments)


def with_uuid(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the arguments of ``rebuild_cuda_tensor`` with the UUID of the GPU instead of its index."""
    uuid = str(torch.cuda.get_device_properties(arguments[DEVICE_ARGUMENT]).uuid)
    return (*arguments[:DEVICE_ARGUMENT], uuid, *arguments[DEVICE_ARGUMENT + 1 :])


def _serialize(bucket: Bucket) -> str:
    """Return SGLang's flattened bucket, pickled, in base64. SGLang reads the metadata by attribute."""
    metadata, start = [], 0
    for name, dtype, shape in zip(bucket.names, bucket.dtypes, bucket.shapes, strict=True):
        size = shape.numel() * dtype.itemsize
        extent = {"start_idx": start, "end_idx": start + size, "numel": size}
        metadata.append(SimpleNamespace(name=name, shape=shape, dtype=dtype, **extent))
        start += size
    buffer = io.BytesIO()
    with _sharing_by_name():
        flat = _NamedByUUID(bucket.flat) if bucket.flat.is_cuda else bucket.flat
        ForkingPickler(buffer).dump({"flattened_tensor": flat, "metadata": metadata})
    return base64.b64encode(buffer.getvalue()).decode()
