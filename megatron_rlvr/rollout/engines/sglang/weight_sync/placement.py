"""Where servers and training processes run, and which process hands its copy of the weights to which rank of a server.

A server that shares a node with training processes receives the weights from them, through shared memory. On GPUs, each
rank of the server reads the memory of the process on its own GPU: a process that read another GPU's memory would need a
CUDA context there.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_rlvr.errors import UserError
from megatron_rlvr.log_tail import error_line
from megatron_rlvr.megatron import device
from megatron_rlvr.node import node_name
from megatron_rlvr.rollout.engines.sglang.registry import ServerPlace

_QUERY_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class RankPlace:
    """Where a training process runs.

    Attributes:
        node: name of its node.
        gpu: UUID of its GPU; None on the CPU.
    """

    node: str
    gpu: str | None = None

    @classmethod
    def of_this_process(cls) -> RankPlace:
        """Return the place of this process."""
        gpu = str(torch.cuda.get_device_properties(device.device()).uuid) if device.on_gpu() else None
        return cls(node_name(), gpu)


def suppliers(server: ServerPlace, server_ranks: int, processes: Sequence[RankPlace]) -> list[int]:
    """Return the training process that hands its copy of the weights to each rank of a server.

    Args:
        server: the server.
        server_ranks: number of its ranks.
        processes: the places of all training processes, by rank.

    Raises:
        UserError: if no process runs on the node of the server, or on one of its GPUs.
    """
    local = [rank for rank, place in enumerate(processes) if place.node == server.node]
    remedy = "set rollout.sglang.weight_sync=distributed or disk"
    if not local:
        raise UserError(
            f"the server at {server.url} runs on {server.node}, where no training process runs (they run on "
            f"{', '.join(sorted({place.node for place in processes}))}), so it cannot share memory with one: {remedy}"
        )
    if not server.gpus:
        return [local[number % len(local)] for number in range(server_ranks)]
    by_gpu = {processes[rank].gpu: rank for rank in local}
    for gpu in server.gpus:
        if gpu not in by_gpu:
            raise UserError(
                f"the server at {server.url} uses GPU {gpu} of {server.node}, on which no training process runs: give "
                f"each server rank the GPU of a training process, or {remedy}"
            )
    return [by_gpu[gpu] for gpu in server.gpus]


def check_broadcast(servers: Iterable[ServerPlace], sender: RankPlace, nccl: str | None) -> None:
    """Refuse a process group of the sender and all servers that NCCL cannot form.

    Args:
        servers: the servers.
        sender: the place of the process that broadcasts.
        nccl: version of NCCL in the trainer's environment; None on the CPU.

    Raises:
        UserError: if a server uses another version of NCCL, or the GPU of the sender.
    """
    for server in servers:
        if None not in (nccl, server.nccl) and server.nccl != nccl:
            raise UserError(
                "rollout.sglang.weight_sync=distributed needs the same NCCL in both environments: the trainer has "
                f"{nccl}, the server at {server.url} has {server.nccl}; install the same, or set weight_sync=disk"
            )
        if sender.gpu is not None and sender.gpu in server.gpus:
            raise UserError(
                f"the server at {server.url} uses the GPU of rank 0 ({sender.gpu} of {server.node}), and NCCL refuses "
                "two ranks of a group on one GPU: set rollout.sglang.weight_sync=tensor"
            )


def nccl_version(python: str) -> str | None:
    """Return the version of NCCL that torch has in the environment of a Python executable; None on the CPU.

    Raises:
        UserError: if its torch cannot be imported.
    """
    program = "import torch; print('.'.join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else '')"
    try:
        done = subprocess.run(
            [python, "-c", program], capture_output=True, text=True, timeout=_QUERY_TIMEOUT_S, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        reason = error_line(getattr(error, "stderr", None) or str(error))
        raise UserError(f"torch of {python} does not report its version of NCCL ({reason}): repair it") from error
    return done.stdout.strip() or None


def own_nccl_version() -> str | None:
    """Return the version of NCCL of this process; None on the CPU."""
    version: Any = torch.cuda.nccl.version() if device.on_gpu() else ()
    return ".".join(map(str, version)) or None


def gpu_uuids(gpus: Sequence[str]) -> tuple[str, ...]:
    """Return the UUIDs of GPUs, as torch writes them, from their indices or UUIDs in CUDA_VISIBLE_DEVICES.

    Raises:
        UserError: if nvidia-smi does not answer.
    """
    if not gpus:
        return ()
    command = ["nvidia-smi", "--query-gpu=index,uuid", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=_QUERY_TIMEOUT_S, check=True).stdout
        known = dict(line.split(", ") for line in answer.strip().splitlines())
        found = [known[gpu] if gpu in known else next(u for u in known.values() if u.startswith(gpu)) for gpu in gpus]
    except (OSError, ValueError, StopIteration, subprocess.SubprocessError) as error:
        raise UserError(f"nvidia-smi does not report the UUIDs of GPUs {', '.join(gpus)} ({error!r})") from error
    return tuple(uuid.removeprefix("GPU-") for uuid in found)
