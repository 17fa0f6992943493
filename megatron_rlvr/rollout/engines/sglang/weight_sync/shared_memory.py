"""Send weights through shared memory to servers on the main process's machine."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import os
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from multiprocessing.reduction import ForkingPickler
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor

from megatron_rlvr.errors import UserError
from megatron_rlvr.megatron import device
from megatron_rlvr.rollout.engines.sglang.endpoint import ServerLostError
from megatron_rlvr.rollout.engines.sglang.weight_sync.transport import Receiver
from megatron_rlvr.weights.buckets import Bucket

_SHARED_MEMORY = "/dev/shm"


class SharedMemoryTransport:
    """See `Transport`. Buckets are in shared memory (CUDA IPC on a GPU), and only their addresses go over HTTP."""

    receivers: Sequence[Receiver] = ()
    _manager_started: ClassVar[bool] = False

    def allocate(self, size: int) -> Tensor:
        """See `Transport.allocate`; raises UserError if the shared memory of the machine is too small."""
        if device.on_gpu():
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

    async def connect(self, receivers: Sequence[Receiver]) -> None:
        self.receivers = receivers

    async def send(self, bucket: Bucket, fields: dict[str, Any]) -> None:
        commands = []
        for receiver in self.receivers:
            # Serialized once per reader, because each reader releases one reference to the memory.
            handles = [_serialize(bucket) for _ in range(receiver.ranks)]
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


def _serialize(bucket: Bucket) -> str:
    """Return SGLang's flattened bucket, pickled, in base64. SGLang reads the metadata by attribute."""
    metadata, start = [], 0
    for name, shape in zip(bucket.names, bucket.shapes, strict=True):
        size = shape.numel() * bucket.dtype.itemsize
        extent = {"start_idx": start, "end_idx": start + size, "numel": size}
        metadata.append(SimpleNamespace(name=name, shape=shape, dtype=bucket.dtype, **extent))
        start += size
    buffer = io.BytesIO()
    with _sharing_by_name():
        ForkingPickler(buffer).dump({"flattened_tensor": bucket.flat, "metadata": metadata})
    return base64.b64encode(buffer.getvalue()).decode()
