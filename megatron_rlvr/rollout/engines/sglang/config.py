"""The section ``rollout.sglang`` of the configuration."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from megatron_rlvr.checked_input import shown
from megatron_rlvr.config_schema import Bounds, PositiveInt, Seconds
from megatron_rlvr.errors import UserError
from megatron_rlvr.rollout.engines.sglang.server_arguments import check_arguments


@dataclass
class SGLangConfig:
    """SGLang servers, for ``rollout.engine: sglang``."""

    urls: list[str] = field(default_factory=list)
    """URLs of running servers, ``http://host:port``; if empty, the trainer starts as many servers as `servers` says.
    The environment variable RLVR_SGLANG_KEY holds the key (``--api-key``) of running servers that demand one."""
    registry: str | None = None
    """Folder in which ``megatron_rlvr.cluster.serve`` describes the servers of `urls`: their nodes and GPUs. Job
    scripts set it. `weight_sync` needs it to share memory with servers of other nodes than the main process's."""
    servers: Annotated[int, Bounds(above=0, cap=1024)] = 1
    """Servers that the trainer starts on the machine of its main process."""
    python: str | None = None
    """Python executable of the environment that SGLang is installed in; null means the trainer's Python."""
    model_path: str | None = None
    """Hugging Face folder that servers start from, for servers that hold the policy's weights in another form
    (`quantization`); null means ``model.path``."""
    server: dict[str, Any] = field(default_factory=dict)
    """Arguments of ``sglang.launch_server`` by name, such as ``tensor_parallel_size: 2``; true sets a flag. Names and
    values are checked against the arguments of SGLang 0.5.23."""
    environment: dict[str, str] = field(default_factory=dict)
    """Environment variables of the servers, in addition to the trainer's."""
    concurrency: PositiveInt = 256
    """Completions that one data-parallel rank keeps in flight per server. All completions of a prompt are requested
    together."""
    prefill_once_from: Annotated[int, Bounds(at_least=0, cap=2**24)] = 128
    """Prompts of at least this many tokens are computed once, not once per sample: a request without new tokens puts
    the prompt into the server's prefix cache before its samples are requested. 0 never does; nor do servers without a
    prefix cache (``server.disable_radix_cache``)."""
    weight_sync: Literal["auto", "disk", "tensor", "distributed", "delta"] = "auto"
    """How servers receive new weights. ``tensor``: through shared memory (CUDA IPC on a GPU), for servers on the nodes
    of training processes. ``distributed``: broadcasts in a process group with the servers (NCCL, or gloo on a CPU).
    ``disk``: a Hugging Face folder in the run directory, which the servers must see under the same path. ``delta``:
    the elements that changed, through the run directory, or over HTTP to nodes that do not see it, applied to a copy of
    the weights on every node. ``auto``:
    tensor for servers that the trainer starts. For `urls`, tensor if the `registry` has servers on this node,
    distributed if it has none, and disk without a registry."""
    full_sync_every: PositiveInt = 50
    """With ``delta``, the full weights travel at every multiple of this many steps, and whenever a node needs them."""
    local_folder: str = "/dev/shm"
    """Folder of every node, in its memory or on a disk of its own, for its copy of the weights with ``delta``. It needs
    room for twice their size while a delta is applied."""
    bucket_mb: Annotated[int, Bounds(above=0, cap=2**20)] | None = None
    """MiB of weights that ``tensor`` and ``distributed`` send at once. There are two such buckets: one is gathered
    while the other is sent. null means 1024 on GPUs and 256 on a CPU."""
    recovery_copy: bool = True
    """With ``tensor`` and ``distributed``, also write the weights to disk in the background. A server that is lost and
    comes back between two updates loads this copy; without it, the server is unused until the next update."""
    interrupt: Literal["retract", "in_place", "finish"] = "retract"
    """What happens to unfinished completions when weights change, with `rollout.max_staleness` > 0: ``retract``
    recomputes their key/value cache with the new weights and continues, ``in_place`` continues with the old cache,
    ``finish`` waits until they are complete before the update."""
    release_memory: bool = False
    """Servers on the trainer's GPUs release their memory while the policy trains; needs
    ``server.enable_memory_saver: true``."""
    check_weights: bool = False
    """After ``tensor`` and ``distributed``, compare checksums of norm weights with the servers (CPU only)."""
    start_timeout_seconds: Seconds = 900.0
    """Longest wait for a server to become ready, and for any server to come back if all are lost."""
    request_timeout_seconds: Seconds = 1800.0
    """Longest wait for the completions of one prompt."""
    update_timeout_seconds: Seconds = 600.0
    """Longest wait for one server to load new weights."""
    health_timeout_seconds: Seconds = 10.0
    """A server that answers no health check for this long counts as hung; its requests go to other servers."""
    attempts: PositiveInt = 10
    """The run ends with an error after this many servers were lost while they worked on the same prompt."""
    when_all_lost: Literal["stop", "wait"] = "stop"
    """What to do if all servers are lost and none comes back within `start_timeout_seconds`: ``stop`` with a checkpoint
    and exit status 75, or ``wait``."""

    def check(self) -> None:
        """Refuse combinations of keys that cannot work."""
        for url in self.urls:
            if not _is_url(url):
                raise UserError(f"rollout.sglang.urls: {url!r} is not a URL: write http://host:port")
        if self.weight_sync == "delta" and not Path(self.local_folder).is_absolute():
            raise UserError(
                f"rollout.sglang.local_folder={shown(self.local_folder)} must be an absolute path, the same on all "
                "nodes: write /dev/shm, or a folder on a disk of every node"
            )
        for name in self.environment:
            if not name or set(name) & {"=", "\0"}:
                raise UserError(
                    f"rollout.sglang.environment: {shown(name)} is not the name of a variable: write a name without ="
                )
        check_arguments(self.server)


def _is_url(text: str) -> bool:
    """Whether a text is the URL of a host, with a valid port if it has one."""
    try:
        parts = urlsplit(text)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0 and text.isprintable()
    except ValueError:
        return False
