"""The all-reduce of the preflight: every process of some nodes, in children that can be killed when they hang."""

from __future__ import annotations

import datetime
import json
import os
import select
import signal
import time
import traceback
from collections.abc import Sequence

import torch
import torch.distributed as dist

_ROUNDS = 5


def bus_bandwidth(size: int, processes: int, seconds: float) -> float:
    """Bytes a second over the slowest link of a ring all-reduce of `size` bytes, 2 (n - 1) / n of which pass it."""
    return 2 * (processes - 1) / processes * size / seconds if processes > 1 else 0.0


def timed_all_reduce(
    endpoint: tuple[str, int], name: str, nodes: Sequence[int], node: int, processes: int, gpu: bool, seconds: float
) -> dict[str, float] | str:
    """Run one all-reduce over all processes of `nodes`; ``{"seconds", "bytes"}`` of a round, or what went wrong.

    Args:
        endpoint: host and port of the job's TCPStore.
        name: of this all-reduce; its own in the store.
        node: this node, one of `nodes`.
        processes: of a node, one a GPU.
        seconds: after which it counts as hung.
    """
    children = []
    deadline = time.monotonic() + seconds
    for local in range(processes):
        reader, writer = os.pipe()
        # A fork has torch imported already. CUDA must not have been touched here.
        pid = os.fork()
        if pid == 0:
            os.close(reader)
            rank, size = nodes.index(node) * processes + local, len(nodes) * processes
            _child(writer, endpoint, name, rank, size, local if gpu else None, seconds)
        os.close(writer)
        children.append((pid, reader))
    results = [_result(pid, reader, deadline) for pid, reader in children]
    wrong = [result for result in results if isinstance(result, str)]
    return wrong[0] if wrong else max((r for r in results if isinstance(r, dict)), key=lambda r: r["seconds"])


def _child(
    pipe: int, endpoint: tuple[str, int], name: str, rank: int, size: int, gpu: int | None, seconds: float
) -> None:
    """One process of the all-reduce; writes its result to `pipe` and ends."""
    try:
        timeout = datetime.timedelta(seconds=seconds)
        store = dist.TCPStore(*endpoint, is_master=False, wait_for_workers=False, timeout=timeout)
        if gpu is not None:
            torch.cuda.set_device(gpu)
        dist.init_process_group(
            "gloo" if gpu is None else "nccl",
            store=dist.PrefixStore(name, store),
            rank=rank,
            world_size=size,
            timeout=timeout,
        )
        count = (1 << 20) if gpu is None else (1 << 26)
        values = torch.full((count,), float(rank + 1), device="cpu" if gpu is None else "cuda")
        dist.all_reduce(values)
        if values[-1].item() != size * (size + 1) / 2:
            raise RuntimeError(f"the sum over {size} processes came out as {values[-1].item()}")
        began = time.perf_counter()
        for _ in range(_ROUNDS):
            dist.all_reduce(values)
        if gpu is not None:
            torch.cuda.synchronize()
        result: object = {"seconds": (time.perf_counter() - began) / _ROUNDS, "bytes": 4.0 * count}
    except Exception as error:
        result = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        traceback.print_exc()
    os.write(pipe, json.dumps(result).encode())
    os._exit(0)


def _result(pid: int, pipe: int, deadline: float) -> dict[str, float] | str:
    """A child's result; a child that has none at the deadline is killed."""
    with os.fdopen(pipe, "rb") as file:
        ready, _, _ = select.select([file], [], [], max(0.0, deadline - time.monotonic()))
        text = file.read() if ready else b""
    if not text:
        os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    if text:
        return json.loads(text)
    return "it died" if ready else "it did not end in time"
