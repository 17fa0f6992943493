"""Which process groups a training uses while one of its processes waits for a verifier, a server or a disk.

`watch` records every collective of this process with its group, and every wait: the verification of completions, a file
that is read or written, a command to a server. `violations` compares the records of all processes. A process must not
enter a collective of a computing group while another waits: on GPUs, it would sit in an NCCL kernel until the wait is
over.
"""

from __future__ import annotations

import functools
import importlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch.distributed as dist
from torch.distributed import distributed_c10d

# Where a process waits. Each call takes a little longer than it would, so that the others come to their next
# collective.
WAITS = {
    "a verifier": ["megatron_rlvr.verifiers.pool:VerifierPool.verify"],
    "a recording": [
        "megatron_rlvr.rollout.engines.replay:read_recorded_group",
        "megatron_rlvr.rollout.collection:record_group",
    ],
    "the disk": [
        "megatron_rlvr.megatron.sharded_checkpoint:DiskWriter.write_data",
        "megatron_rlvr.training.checkpoint:write_record",
        "megatron_rlvr.training.checkpoints_folder:write_text",
        "megatron_rlvr.weights.huggingface_folder:save_file",
        "megatron_rlvr.telemetry.metrics:MetricsWriter.write",
    ],
    "a server": ["megatron_rlvr.rollout.engines.sglang.endpoint:Endpoint.request"],
}
COLLECTIVES = (
    *("all_reduce", "broadcast", "all_gather", "all_gather_into_tensor", "reduce_scatter_tensor", "all_to_all_single"),
    *(
        "all_gather_object",
        "broadcast_object_list",
        "gather_object",
        "scatter_object_list",
        "barrier",
        "monitored_barrier",
    ),
    *("send", "recv", "isend", "irecv", "batch_isend_irecv", "gather", "scatter", "reduce"),
)
DELAY_S = 0.004


@contextmanager
def watch(folder: Path) -> Iterator[None]:
    """Record this process's collectives and waits while the block runs, in a file of `folder`."""
    collectives: list[tuple[float, str, str]] = []
    waits: list[tuple[float, float, str]] = []
    rank = -1

    def recorded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal rank
            group = kwargs.get("group") or next((a for a in args if isinstance(a, dist.ProcessGroup)), None)
            if name == "batch_isend_irecv":
                group = args[0][0].group if args[0] else group
            group = group or distributed_c10d._get_default_group()
            rank = rank if rank >= 0 else dist.get_rank()
            collectives.append((time.monotonic(), name, group.group_desc))
            return function(*args, **kwargs)

        return call

    def slow(what: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            began = time.monotonic()
            time.sleep(DELAY_S)
            try:
                return function(*args, **kwargs)
            finally:
                waits.append((began, time.monotonic(), what))

        return call

    with ExitStack() as patches:
        for name in COLLECTIVES:
            patched = recorded(name, getattr(dist, name))
            patches.enter_context(mock.patch.object(dist, name, patched))
            patches.enter_context(mock.patch.object(distributed_c10d, name, patched))
        for what, places in WAITS.items():
            for place in places:
                module, _, path = place.partition(":")
                *owners, name = path.split(".")
                owner = functools.reduce(getattr, owners, importlib.import_module(module))
                patches.enter_context(mock.patch.object(owner, name, slow(what, getattr(owner, name))))
        yield
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"waits_of_rank_{max(rank, 0)}.json").write_text(json.dumps({"collectives": collectives, "waits": waits}))


def computes(group: str) -> bool:
    """Whether a group's collectives run on the GPU: neither the groups for waiting nor megatron-core's gloo groups."""
    return not group.startswith("waiting") and "GLOO" not in group.upper()


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("waits_of_rank_*.json"))]


def violations(folder: Path) -> list[str]:
    """One line for each collective of a computing group that one process entered while another waited."""
    found = []
    for rank, waiter in enumerate(by_rank := records(folder)):
        for began, ended, what in waiter["waits"]:
            for other, record in enumerate(by_rank):
                found += [
                    f"rank {other} entered {name} in {group or 'an unnamed group'} while rank {rank} waited for {what}"
                    for at, name, group in record["collectives"]
                    if other != rank and began < at < ended and computes(group)
                ]
    return found
