"""The all-reduce of the preflight: every process of some nodes, in children that can be killed when they hang."""

from __future__ import annotations

import datetime
import functools
import time
from collections.abc import Sequence

import torch
import torch.distributed as dist

from megatron_rlvr.cluster.children import ChildError, start

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
    deadline = time.monotonic() + seconds
    children = []
    for local in range(processes):
        rank, size = nodes.index(node) * processes + local, len(nodes) * processes
        work = functools.partial(_rank_all_reduce, endpoint, name, rank, size, local if gpu else None, seconds)
        children.append(start(work))
    results, wrong = [], []
    for child in children:
        try:
            results.append(child.result(deadline))
        except ChildError as error:
            wrong.append(str(error))
    return wrong[0] if wrong else max(results, key=lambda result: result["seconds"])


def _rank_all_reduce(
    endpoint: tuple[str, int], name: str, rank: int, size: int, gpu: int | None, seconds: float
) -> dict[str, float]:
    """One process of the all-reduce.

    Raises:
        RuntimeError: when the sum is wrong, and whatever torch.distributed does.
    """
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
    return {"seconds": (time.perf_counter() - began) / _ROUNDS, "bytes": 4.0 * count}
