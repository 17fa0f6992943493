"""The `rollout.sglang` section of the configuration."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class SGLangConfig:
    urls: list[str] = field(default_factory=list)
    """Servers run elsewhere, ``http://host:port``; empty: the trainer starts `servers` of its own."""
    servers: int = 1
    """Servers that the trainer starts on the machine of its main process."""
    python: str | None = None
    """Python of the environment that SGLang is installed in; by default the trainer's own."""
    server: dict[str, Any] = field(default_factory=dict)
    """Arguments of ``sglang.launch_server`` by name, such as ``tensor_parallel_size: 2``; true is a bare flag."""
    environment: dict[str, str] = field(default_factory=dict)
    """Environment variables of the servers, on top of the trainer's."""
    concurrency: int = 256
    """Completions that one data-parallel rank has under way at one server; those of one prompt travel together."""
    weight_sync: str = "auto"
    """``tensor``: through shared memory (CUDA IPC on a GPU), for servers on the main process's machine.
    ``distributed``: broadcasts in a process group with the servers (NCCL, gloo on the CPU).
    ``disk``: a Hugging Face folder in the run directory, which the servers must see under the same path.
    ``auto``: ``tensor`` for servers that the trainer starts, ``disk`` for `urls`."""
    bucket_mb: int = 256
    """Mebibytes of weights that ``tensor`` and ``distributed`` send at once."""
    recovery_copy: bool = True
    """Beside ``tensor`` and ``distributed``, write the weights to disk in the background, for servers that are lost and
    come back before the next update; without it they stay out until then."""
    interrupt: str = "retract"
    """What becomes of completions under way when weights change (`max_staleness` > 0): ``retract`` computes their cache
    anew under the new weights and goes on, ``in_place`` goes on with the old cache, ``finish`` lets them end before."""
    release_memory: bool = False
    """Servers on the trainer's GPUs give up their memory while the policy trains (set server.enable_memory_saver)."""
    check_weights: bool = False
    """After ``tensor`` and ``distributed``, compare checksums of the norms' weights (servers on the CPU)."""
    start_timeout_seconds: float = 900.0
    """Longest wait for a server to become ready, and for any server to come back when none is left."""
    request_timeout_seconds: float = 1800.0
    """Longest time for the completions of one prompt."""
    update_timeout_seconds: float = 600.0
    """Longest time for one server to load new weights."""
    health_timeout_seconds: float = 10.0
    """A server that does not answer a health check for this long is hung: its requests go to others."""
    attempts: int = 10
    """Servers that may die under one prompt before the run ends with an error."""
    when_all_lost: str = "stop"
    """No server left for `start_timeout_seconds`: ``stop`` with a checkpoint and status 75, or ``wait`` for one."""
