"""Two ways of handing a bucket of weights to running servers: through shared memory, or by a broadcast."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import datetime
import io
import itertools
import os
import socket
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler
from types import SimpleNamespace
from typing import Any, ClassVar, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from megatron_rlvr.errors import UserError
from megatron_rlvr.megatron import device
from megatron_rlvr.rollout.engines.sglang.endpoint import Endpoint, ServerLostError
from megatron_rlvr.weights.buckets import Bucket

T = TypeVar("T")
_SHARED_MEMORY = "/dev/shm"
_GLOO_TIMEOUT_S = 60.0  # for one bucket; a refused one holds its thread, and other servers, for so long


@dataclass(frozen=True)
class Receiver:
    """A server that is given weights: over how many ranks its model is spread, and how often it was started."""

    endpoint: Endpoint
    ranks: int
    starts: int


class Transfer(Protocol):
    """Hands buckets to servers that have begun a weight update."""

    def allocate(self, size: int) -> Tensor:
        """A uint8 buffer for a bucket, [size]."""
        ...

    async def begin(self, receivers: Sequence[Receiver]) -> None:
        """Get ready for these servers."""
        ...

    async def send(self, bucket: Bucket, extra: dict[str, Any]) -> None:
        """Give a bucket to all of them; `extra` goes into each request.

        Raises:
            ServerLostError: when one does not take it; none of them can be relied on then.
        """
        ...

    def abandon(self) -> None:
        """After a failure: let go of servers that may wait for more."""
        ...

    def close(self) -> None:
        """At the end of the run."""
        ...


class SharedMemoryTransfer:
    """For servers on this machine: the bucket lies in shared memory (CUDA IPC on a GPU), its address goes over HTTP."""

    receivers: Sequence[Receiver] = ()
    _shared_before: ClassVar[bool] = False

    def allocate(self, size: int) -> Tensor:
        if device.on_gpu():
            return torch.empty(size, dtype=torch.uint8, device=device.device())
        found = os.statvfs(_SHARED_MEMORY)
        if size > (free := found.f_bavail * found.f_frsize):  # else the kernel would kill whoever writes there
            raise UserError(
                f"{_SHARED_MEMORY} has {free >> 20} MiB left, a bucket of weights needs {size >> 20}: lower "
                "rollout.sglang.bucket_mb, or set rollout.sglang.weight_sync=disk"
            )
        with _FileSystemSharing(), nullcontext() if self._shared_before else _without_stderr():
            SharedMemoryTransfer._shared_before = True
            return torch.empty(0, dtype=torch.uint8).set_(torch.UntypedStorage._new_shared(size))

    async def begin(self, receivers: Sequence[Receiver]) -> None:
        self.receivers = receivers

    async def send(self, bucket: Bucket, extra: dict[str, Any]) -> None:
        requests = []
        for receiver in self.receivers:
            # Serialised once for each reader: each gives back one reference to the memory.
            body = {"serialized_named_tensors": [_serialized(bucket) for _ in range(receiver.ranks)], **extra}
            body["load_format"] = "flattened_bucket"
            what = "take weights from shared memory"
            requests.append(receiver.endpoint.order("/update_weights_from_tensor", body, what))
        try:
            await asyncio.gather(*requests)
        except UserError as error:
            raise ServerLostError(str(error)) from error

    def abandon(self) -> None:
        pass

    def close(self) -> None:
        pass


class _FileSystemSharing:
    """Share CPU memory by name: a server that is no child of this process dies of a shared file descriptor."""

    def __enter__(self) -> None:
        self.before = torch.multiprocessing.get_sharing_strategy()
        torch.multiprocessing.set_sharing_strategy("file_system")

    def __exit__(self, *_: object) -> None:
        torch.multiprocessing.set_sharing_strategy(self.before)


@contextlib.contextmanager
def _without_stderr() -> Iterator[None]:
    """Let no child that is started meanwhile have this process's stderr.

    The first memory that is shared by name starts torch's torch_shm_manager, which lives as long as a server that it is
    shared with: whoever reads this process's output through a pipe would wait for the end of both.
    """
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nothing, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)


def _serialized(bucket: Bucket) -> str:
    """SGLang's flattened bucket, whose metadata it reads attribute by attribute."""
    metadata, start = [], 0
    for name, shape in zip(bucket.names, bucket.shapes, strict=True):
        size = shape.numel() * bucket.dtype.itemsize
        place = {"start_idx": start, "end_idx": start + size, "numel": size}
        metadata.append(SimpleNamespace(name=name, shape=shape, dtype=bucket.dtype, **place))
        start += size
    buffer = io.BytesIO()
    with _FileSystemSharing():
        ForkingPickler(buffer).dump({"flattened_tensor": bucket.flat, "metadata": metadata})
    return base64.b64encode(buffer.getvalue()).decode()


_group_numbers = itertools.count(1)  # of this process: torch keeps the name of a group that was left to its timeout


class BroadcastTransfer:
    """For servers anywhere: a process group of this process and every rank of every server; NCCL, or gloo on the CPU.

    The group stays for later updates, as long as the same servers, started the same number of times, are in it.
    """

    def __init__(self, timeout_seconds: float):
        self.timeout = timeout_seconds
        self.backend = "nccl" if device.on_gpu() else "gloo"
        self.receivers: Sequence[Receiver] = ()
        self.group: dist.ProcessGroup | None = None
        self.members: list[tuple[str, int, int]] = []
        self.collectives: list[threading.Thread] = []
        self.name = ""

    def allocate(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, device=device.device())

    async def begin(self, receivers: Sequence[Receiver]) -> None:
        self.receivers = receivers
        members = [(r.endpoint.url, r.ranks, r.starts) for r in receivers]
        if self.group is not None and members == self.members:
            return
        self.abandon()
        local = all(r.endpoint.connections.host in ("127.0.0.1", "localhost") for r in receivers)
        host = "127.0.0.1" if local else socket.gethostname()
        with socket.socket() as probe:
            probe.bind(("", 0))
            port = probe.getsockname()[1]
        self.name = f"weights-{os.getpid()}-{next(_group_numbers)}"
        size = 1 + sum(r.ranks for r in receivers)
        requests, offset = [], 1
        for receiver in receivers:
            body = {"master_address": host, "master_port": port, "rank_offset": offset, "world_size": size}
            body |= {"group_name": self.name, "backend": self.backend}
            what = "join the group for weights"
            requests.append(receiver.endpoint.order("/init_weights_update_group", body, what))
            offset += receiver.ranks
        self.group = await self._beside(requests, lambda: self._join(host, port, size))
        self.members = members

    def _join(self, host: str, port: int, size: int) -> dist.ProcessGroup:
        """This process's side of the group: what SGLang does on its own, with the same store and names."""
        seconds = self.timeout if self.backend == "nccl" else min(self.timeout, _GLOO_TIMEOUT_S)
        timeout = datetime.timedelta(seconds=seconds)
        # Not by dist.rendezvous: under torchrun that takes every store to be torchrun's own, and starts none.
        store = dist.TCPStore(host, port, size, is_master=True, timeout=timeout)
        store.set_timeout(timeout)
        # torch has no public way to form a group with processes outside of the default one.
        group, _ = distributed_c10d._new_process_group_helper(
            size,
            0,
            [],
            dist.Backend(self.backend),
            dist.PrefixStore(self.name, store),
            group_name=distributed_c10d.GroupName(self.name),
            timeout=timeout,
        )
        distributed_c10d._world.pg_group_ranks[group] = {i: i for i in range(size)}
        return group

    async def send(self, bucket: Bucket, extra: dict[str, Any]) -> None:
        body = {"names": bucket.names, "shapes": [list(shape) for shape in bucket.shapes], "group_name": self.name}
        body |= {"dtypes": [str(bucket.dtype).removeprefix("torch.")] * len(bucket.names), **extra}
        body["load_format"] = "flattened_bucket"
        path, what = "/update_weights_from_distributed", "take weights from the broadcast"
        group = self.group
        requests = [endpoint.order(path, body, what) for endpoint in (r.endpoint for r in self.receivers)]
        await self._beside(requests, lambda: dist.broadcast(bucket.flat, group_src=0, group=group))

    async def _beside(self, requests: Sequence[Coroutine[Any, Any, None]], collective: Callable[[], T]) -> T:
        """Run a collective in a thread while the servers are asked for their part of it.

        A server that refuses leaves the collective hanging: it is left alone at once, and `abandon` ends it.
        """
        ours, thread = _in_thread(collective)
        self.collectives = [earlier for earlier in self.collectives if earlier.is_alive()] + [thread]
        theirs = [asyncio.ensure_future(request) for request in requests]
        every: list[asyncio.Future[Any]] = [*theirs, ours]
        try:
            await asyncio.wait(every, return_when=asyncio.FIRST_EXCEPTION, timeout=self.timeout)
            for task in every:
                if task.done() and (error := task.exception()) is not None:
                    raise ServerLostError(str(error)) from error
            if not all(task.done() for task in every):
                raise ServerLostError("a broadcast of weights was not over in rollout.sglang.update_timeout_seconds")
            return ours.result()
        finally:
            for task in theirs:
                task.cancel()

    def abandon(self) -> None:
        group, self.group, self.members = self.group, None, []
        if group is not None and self.backend == "nccl":
            group.abort()
            dist.destroy_process_group(group)
        # Gloo has no abort, and its destructor waits for what is under way. So the group is left to its timeout, which
        # closes its connections and so ends the waiting of servers in it.

    def close(self) -> None:
        """Wait for collectives that were left alone: one that ends while the interpreter does may abort the process."""
        for thread in self.collectives:
            thread.join(_GLOO_TIMEOUT_S)


def _in_thread(work: Callable[[], T]) -> tuple[asyncio.Future[T], threading.Thread]:
    """Run `work` in a thread that nobody has to wait for, unlike an executor's."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def tell(outcome: Callable[[], None]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: the caller has given up
            loop.call_soon_threadsafe(lambda: None if future.done() else outcome())

    def run() -> None:
        try:
            result = work()
        except Exception as error:
            tell(lambda error=error: future.set_exception(error))  # type: ignore[misc]
        else:
            tell(lambda: future.set_result(result))

    thread = threading.Thread(target=run, name="weights", daemon=True)
    thread.start()
    return future, thread
