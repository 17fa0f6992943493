"""The section ``rollout.sglang`` of the configuration."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_rlvr.config_schema import PositiveFloat, PositiveInt
from megatron_rlvr.errors import UserError

SET_BY_THE_TRAINER = ("model_path", "model", "port", "weight_version", "skip_tokenizer_init")
"""Arguments of ``sglang.launch_server`` that no configuration may give."""


@dataclass
class SGLangConfig:
    """SGLang servers, for ``rollout.engine: sglang``."""

    urls: list[str] = field(default_factory=list)
    """Servers that run already, ``http://host:port``; with none, the trainer starts `servers` of its own."""
    servers: PositiveInt = 1
    """Servers that the trainer starts on the machine of its main process."""
    python: str | None = None
    """Python executable of the environment that SGLang is installed in; null is the trainer's own."""
    server: dict[str, Any] = field(default_factory=dict)
    """Arguments of ``sglang.launch_server`` by name, such as ``tensor_parallel_size: 2``; true is a bare flag."""
    environment: dict[str, str] = field(default_factory=dict)
    """Environment variables of the servers, on top of the trainer's."""
    concurrency: PositiveInt = 256
    """Completions that one data-parallel rank keeps in flight per server; those of one prompt are sent together."""
    weight_sync: Literal["auto", "disk", "tensor", "distributed"] = "auto"
    """How servers receive new weights. ``tensor``: through shared memory (CUDA IPC on a GPU), for servers on the main
    process's machine. ``distributed``: broadcasts in a process group with the servers (NCCL, or gloo on a CPU).
    ``disk``: a Hugging Face folder in the run directory, which the servers must see under the same path. ``auto``:
    tensor for servers that the trainer starts, disk for `urls`."""
    bucket_mb: PositiveInt = 256
    """MiB of weights that ``tensor`` and ``distributed`` send at once."""
    recovery_copy: bool = True
    """With ``tensor`` and ``distributed``, also write the weights to disk in the background. A server that is lost and
    returns between two updates loads that copy; without it, the server stays unused until the next update."""
    interrupt: Literal["retract", "in_place", "finish"] = "retract"
    """What happens to unfinished completions when weights change under `rollout.max_staleness` > 0: ``retract``
    recomputes their key/value cache under the new weights and continues, ``in_place`` continues with the old cache,
    ``finish`` waits for their end before the update."""
    release_memory: bool = False
    """Servers on the trainer's GPUs release their memory while the policy trains; needs
    ``server.enable_memory_saver: true``."""
    check_weights: bool = False
    """After ``tensor`` and ``distributed``, compare checksums of the norms' weights with the servers' (CPU only)."""
    start_timeout_seconds: PositiveFloat = 900.0
    """Longest wait for a server to become ready, and for any server to return when all are lost."""
    request_timeout_seconds: PositiveFloat = 1800.0
    """Longest wait for the completions of one prompt."""
    update_timeout_seconds: PositiveFloat = 600.0
    """Longest wait for one server to load new weights."""
    health_timeout_seconds: PositiveFloat = 10.0
    """A server that answers no health check for this long counts as hung; its requests go to other servers."""
    attempts: PositiveInt = 10
    """Servers that may be lost while they work on one prompt before the run ends with an error."""
    when_all_lost: Literal["stop", "wait"] = "stop"
    """When no server has returned for `start_timeout_seconds`: ``stop`` with a checkpoint and exit status 75, or
    ``wait`` on."""

    def check(self) -> None:
        for url in self.urls:
            if not url.startswith(("http://", "https://")):
                raise UserError(f"rollout.sglang.urls: {url!r} is no URL: write http://host:port")
        for name in self.server:
            if name.replace("-", "_") in SET_BY_THE_TRAINER:
                raise UserError(f"rollout.sglang.server.{name} is set by the trainer itself: leave it out")
