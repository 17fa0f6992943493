"""A timed all-reduce between all processes of several nodes, in forked processes that can be killed if they hang."""

from __future__ import annotations

import datetime
import functools
import time
from collections.abc import Sequence

import torch
import torch.distributed as dist

from megatron_rlvr.cluster.forked_process import ForkedProcessError, fork

_ROUNDS = 5


def bus_bandwidth(size: int, processes: int, seconds: float) -> float:
    """Return bytes per second over the slowest link of a ring all-reduce.

    An all-reduce sends 2 (n - 1) / n times `size` bytes over every link of a ring of n processes.
    """
    return 2 * (processes - 1) / processes * size / seconds if processes > 1 else 0.0


def timed_all_reduce(
    endpoint: tuple[str, int], name: str, nodes: Sequence[int], node: int, processes: int, gpu: bool, seconds: float
) -> dict[str, float] | str:
    """Run this node's part of an all-reduce over all processes of `nodes`.

    Args:
        endpoint: host and port of the job's TCPStore.
        name: key of this all-reduce, unique within the store.
        nodes: numbers of the nodes that take part.
        node: number of this node, one of `nodes`.
        processes: processes per node, one per GPU.
        gpu: whether to use NCCL on GPUs; otherwise gloo on the CPU.
        seconds: deadline, after which the all-reduce counts as hung.

    Returns:
        ``seconds`` and ``bytes`` of one round, or the reason of a failure as text.
    """
    deadline = time.monotonic() + seconds
    ranks = []
    for local_rank in range(processes):
        rank, size = nodes.index(node) * processes + local_rank, len(nodes) * processes
        device = local_rank if gpu else None
        ranks.append(fork(functools.partial(_rank_all_reduce, endpoint, name, rank, size, device, seconds)))
    results, failures = [], []
    for process in ranks:
        try:
            results.append(process.result(deadline))
        except ForkedProcessError as error:
            failures.append(str(error))
    return failures[0] if failures else max(results, key=lambda result: result["seconds"])


def _rank_all_reduce(
    endpoint: tuple[str, int], name: str, rank: int, size: int, gpu: int | None, seconds: float
) -> dict[str, float]:
    """Run one rank of the all-reduce. Raises RuntimeError if the sum is wrong or the collective fails."""
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
        raise RuntimeError(f"the sum over {size} processes is {values[-1].item()} instead of {size * (size + 1) / 2}")
    began = time.perf_counter()
    for _ in range(_ROUNDS):
        dist.all_reduce(values)
    if gpu is not None:
        torch.cuda.synchronize()
    return {"seconds": (time.perf_counter() - began) / _ROUNDS, "bytes": 4.0 * count}
