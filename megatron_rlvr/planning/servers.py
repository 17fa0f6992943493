"""Where the SGLang servers of a job run, what they reserve, and how many sequences their caches hold."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from megatron_rlvr.config import Config
from megatron_rlvr.errors import UserError
from megatron_rlvr.megatron.huggingface_config import read_config
from megatron_rlvr.megatron.stage_shapes import ModelShape
from megatron_rlvr.rollout.engines.sglang.launch_arguments import ServerLayout, normalized
from megatron_rlvr.weights import fp8
from megatron_rlvr.weights.shape_checks import expected_weights

GIB = 1024**3
SERVER_RUNTIME_BYTES = 6 * GIB
"""Assumed, not computed: what a server's process takes of a GPU besides weights and cache. CUDA context, NCCL's
buffers, CUDA graphs and workspaces are 4 to 6 GiB; SGLang's mem_fraction_static does not include them."""


@dataclass(frozen=True)
class Servers:
    """Where the servers of a job run.

    Attributes:
        placement: ``none``; ``colocated``, on the GPUs that train; ``nodes``, on nodes that do not train; ``urls``,
            outside the job.
        nodes: nodes that run servers and do not train.
    """

    placement: Literal["none", "colocated", "nodes", "urls"] = "none"
    nodes: int = 0

    @classmethod
    def of_job(cls, config: Config, option: str | None) -> Servers:
        """Return the servers of a job.

        Args:
            config: the configuration.
            option: ``none``, ``colocated`` or ``nodes:N``, as in RLVR_SERVERS. None, or ``none``, leaves the servers to
                the configuration: those of ``rollout.sglang.urls``, or else servers on the training GPUs.

        Raises:
            UserError: for any other option.
        """
        if option == "colocated":
            return cls("colocated")
        if option is not None and (match := re.fullmatch(r"nodes:([1-9]\d*)", option)):
            return cls("nodes", int(match[1]))
        if option not in (None, "none"):
            raise UserError(f"servers must be none, colocated or nodes:N, found {option!r}")
        if config.rollout.engine != "sglang":
            return cls()
        return cls("urls" if config.rollout.sglang.urls else "colocated")

    def configure(self, config: Config) -> Config:
        """Return the configuration that the job trains with: servers that it starts are its rollout engine.

        The weights reach servers by the transport of their placement, unless the configuration names another one:
        through shared memory on the same GPUs, by a broadcast to other nodes.

        Raises:
            UserError: if the configuration names a transport that does not reach the servers.
        """
        if self.placement == "none":
            return config
        sglang = config.rollout.sglang
        if self.placement == "nodes" and sglang.weight_sync == "tensor":
            raise UserError(
                "rollout.sglang.weight_sync=tensor reaches only servers on the GPUs that train: set it to auto for "
                "servers on other nodes"
            )
        if sglang.weight_sync == "auto":
            transport = _TRANSPORTS[self.placement]
            sglang = replace(sglang, weight_sync=transport)
        return replace(config, rollout=replace(config.rollout, engine="sglang", sglang=sglang))


_TRANSPORTS: dict[str, Literal["tensor", "distributed", "disk"]] = {
    "colocated": "tensor",
    "nodes": "distributed",
    "urls": "disk",
}


def memory_fraction(config: Config) -> float | None:
    """Return ``mem_fraction_static`` of the server arguments; None if they have none.

    Raises:
        UserError: if it is not a number between 0 and 1.
    """
    value = normalized(config.rollout.sglang.server).get("mem_fraction_static")
    if value is None:
        return None
    try:
        fraction = float(value)
    except (TypeError, ValueError):
        fraction = -1.0
    if not 0 < fraction < 1:
        raise UserError(
            f"rollout.sglang.server.mem_fraction_static={value} is not a share of a GPU's memory: set it to a number "
            "between 0 and 1, such as 0.3"
        )
    return fraction


def served_bytes(shape: ModelShape, config: Config, itemsize: int) -> int:
    """Bytes of the weights that generate: all of them, on all GPUs of a replica."""
    if config.rollout.quantization == "none":
        return shape.parameters * itemsize
    quantized, scales = _quantized_elements(Path(config.model.path))
    return (shape.parameters - quantized) * itemsize + quantized + scales * fp8.SCALE_DTYPE.itemsize


@functools.cache
def _quantized_elements(folder: Path) -> tuple[int, int]:
    """Return the number of elements that are quantized, and of their scales."""
    shapes = [torch.Size(s) for name, s in expected_weights(read_config(folder)).items() if fp8.is_quantized(name)]
    return sum(shape.numel() for shape in shapes), sum(fp8.scale_shape(shape).numel() for shape in shapes)


def weight_bytes(shape: ModelShape, config: Config, itemsize: int) -> int:
    """Bytes of the weights on each GPU of a server. Under attention data parallelism, its groups all hold attention."""
    layout = ServerLayout.from_arguments(config.rollout.sglang.server)
    attention = shape.layers * shape.attention_weights * (itemsize if config.rollout.quantization == "none" else 1)
    return (
        served_bytes(shape, config, itemsize) + (layout.attention_groups - 1) * attention
    ) // layout.gpus_per_replica


def cache_bytes_per_token(shape: ModelShape, itemsize: int) -> int:
    """Bytes that one copy of a token's cache has in all layers: keys and values, or their latent."""
    return shape.layers * shape.cached * itemsize


def cache_copies(shape: ModelShape, layout: ServerLayout) -> int:
    """Copies of a token's cache in a replica: heads are split over GPUs, but each of them needs the whole latent."""
    return layout.tensor // layout.attention_groups if shape.latent else 1


def cached_tokens(shape: ModelShape, config: Config, itemsize: int, static_bytes: float) -> float:
    """Tokens whose keys and values a replica holds, if each of its GPUs has `static_bytes` for weights and cache."""
    layout = ServerLayout.from_arguments(config.rollout.sglang.server)
    cache = static_bytes - weight_bytes(shape, config, itemsize)
    per_token = cache_bytes_per_token(shape, itemsize) * cache_copies(shape, layout)
    return max(0.0, cache * layout.gpus_per_replica / per_token)
