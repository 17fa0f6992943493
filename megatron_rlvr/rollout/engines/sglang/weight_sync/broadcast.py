"""Send weights by broadcast in a process group with the servers, which may run on any machine."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import itertools
import os
import threading
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from megatron_rlvr.megatron import device
from megatron_rlvr.node import node_name
from megatron_rlvr.node_address import LOOPBACK, listening_store, node_address
from megatron_rlvr.rollout.engines.sglang.endpoint import ServerLostError
from megatron_rlvr.rollout.engines.sglang.weight_sync.transport import Receiver
from megatron_rlvr.weights.buckets import Bucket

T = TypeVar("T")
# Per bucket. If a server refuses a bucket, the thread of the broadcast and the other servers wait this long.
_GLOO_TIMEOUT_S = 60.0

# Every group of this process needs a new name, because torch keeps the name of a group that was not destroyed.
_group_numbers = itertools.count(1)


class BroadcastTransport:
    """See `Transport`. The process group consists of this process, as rank 0, and every rank of every server.

    The backend is NCCL, or gloo on the CPU. Later updates reuse the group as long as the servers are the same and none
    was restarted.

    Args:
        holds_buckets: whether this process is the one that broadcasts.
        timeout_seconds: time limit of one collective; with gloo at most 60 s.
    """

    def __init__(self, timeout_seconds: float, holds_buckets: bool = True):
        self.holds_buckets = holds_buckets
        self.timeout = timeout_seconds
        self.backend = "nccl" if device.on_gpu() else "gloo"
        self.receivers: Sequence[Receiver] = ()
        self.group: dist.ProcessGroup | None = None
        self.group_name = ""
        self._members: list[tuple[str, int, int]] = []
        self._threads: list[threading.Thread] = []

    def allocate(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, device=device.device())

    def share(self, bucket: Bucket) -> None:
        device.synchronize()  # the broadcast runs in another thread, on another stream

    async def connect(self, receivers: Sequence[Receiver]) -> None:
        self.receivers = receivers
        members = [(r.endpoint.url, r.ranks, r.starts) for r in receivers]
        if self.group is not None and members == self._members:
            return
        self.abandon()
        local = all(r.endpoint.connections.host in ("127.0.0.1", "localhost") for r in receivers)
        host = LOOPBACK if local else node_address(node_name())
        seconds = self.timeout if self.backend == "nccl" else min(self.timeout, _GLOO_TIMEOUT_S)
        timeout = datetime.timedelta(seconds=seconds)
        # Not dist.rendezvous: under torchrun it would connect to torchrun's store instead of starting one.
        try:
            store = listening_store(host, 0, timeout)
        except OSError as error:
            raise ServerLostError(f"the broadcast of weights cannot listen at {host} ({error.strerror})") from error
        self.group_name = f"weights-{os.getpid()}-{next(_group_numbers)}"
        size = 1 + sum(r.ranks for r in receivers)
        commands, rank_offset = [], 1
        for receiver in receivers:
            body = {"master_address": host, "master_port": store.port, "rank_offset": rank_offset, "world_size": size}
            body |= {"group_name": self.group_name, "backend": self.backend}
            action = "join the process group for weights"
            commands.append(receiver.endpoint.command("/init_weights_update_group", body, action))
            rank_offset += receiver.ranks
        self.group = await self._run_with_servers(commands, lambda: self._join(store, size, timeout))
        self._members = members

    def _join(self, store: dist.TCPStore, size: int, timeout: datetime.timedelta) -> dist.ProcessGroup:
        """Join the group as rank 0, with the same store and names with which SGLang's ranks join it."""
        # torch has no public function that forms a group with processes outside the default group.
        group, _ = distributed_c10d._new_process_group_helper(
            size,
            0,
            [],
            dist.Backend(self.backend),
            dist.PrefixStore(self.group_name, store),
            group_name=distributed_c10d.GroupName(self.group_name),
            timeout=timeout,
        )
        distributed_c10d._world.pg_group_ranks[group] = {i: i for i in range(size)}
        return group

    async def send(self, bucket: Bucket, fields: dict[str, Any]) -> None:
        dtypes = [str(dtype).removeprefix("torch.") for dtype in bucket.dtypes]
        body = {"names": bucket.names, "shapes": [list(shape) for shape in bucket.shapes]}
        body |= {"dtypes": dtypes, "group_name": self.group_name, **fields}
        body["load_format"] = "flattened_bucket"
        path, action = "/update_weights_from_distributed", "receive weights from the broadcast"
        group = self.group
        commands = [receiver.endpoint.command(path, body, action) for receiver in self.receivers]
        await self._run_with_servers(commands, lambda: dist.broadcast(bucket.flat, group_src=0, group=group))

    async def _run_with_servers(
        self, commands: Sequence[Coroutine[Any, Any, object]], collective: Callable[[], T]
    ) -> T:
        """Run a collective in a thread while `commands` make the servers take part in it; returns its result.

        If a server refuses, the collective hangs. This method then returns at once without waiting for the thread, and
        `abandon` ends the collective.

        Raises:
            ServerLostError: if a command or the collective fails, or the time limit passes.
        """
        local_future, thread = _run_in_thread(collective)
        self._threads = [earlier for earlier in self._threads if earlier.is_alive()] + [thread]
        server_tasks = [asyncio.ensure_future(command) for command in commands]
        futures: list[asyncio.Future[Any]] = [*server_tasks, local_future]
        try:
            await asyncio.wait(futures, return_when=asyncio.FIRST_EXCEPTION, timeout=self.timeout)
            for future in futures:
                if future.done() and (error := future.exception()) is not None:
                    raise ServerLostError(str(error)) from error
            if not all(future.done() for future in futures):
                raise ServerLostError("a broadcast of weights did not end within rollout.sglang.update_timeout_seconds")
            return local_future.result()
        finally:
            for task in server_tasks:
                task.cancel()

    def abandon(self) -> None:
        group, self.group, self._members = self.group, None, []
        if group is not None and self.backend == "nccl":
            group.abort()
            dist.destroy_process_group(group)
        # Gloo has no abort, and its destructor waits for running collectives. The group is therefore left until its
        # timeout closes its connections, which also releases the servers in it.

    def close(self) -> None:
        """Wait for threads of abandoned collectives, because a thread that ends at interpreter exit may abort it."""
        for thread in self._threads:
            thread.join(_GLOO_TIMEOUT_S)


def _run_in_thread(work: Callable[[], T]) -> tuple[asyncio.Future[T], threading.Thread]:
    """Run `work` in a daemon thread; returns its future and the thread.

    This is not an executor, because Python waits at exit for the threads of executors.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def finish(set_outcome: Callable[[], None]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed, because the caller no longer waits
            loop.call_soon_threadsafe(lambda: None if future.done() else set_outcome())

    def run() -> None:
        try:
            result = work()
        except Exception as error:
            finish(lambda error=error: future.set_exception(error))  # type: ignore[misc]
        else:
            finish(lambda: future.set_result(result))

    thread = threading.Thread(target=run, name="weights", daemon=True)
    thread.start()
    return future, thread
