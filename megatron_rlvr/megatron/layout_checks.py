"""Check that a parallel layout divides a model."""

from __future__ import annotations

import math
from typing import Any

from megatron_rlvr.errors import UserError
from megatron_rlvr.megatron.config import ParallelConfig
from megatron_rlvr.megatron.families import family_of
from megatron_rlvr.megatron.huggingface_config import is_mixture


def check_world_size(parallel: ParallelConfig, world_size: int, unit: str, advice: str) -> None:
    """Refuse a layout that does not divide a job.

    Args:
        parallel: section of the configuration.
        world_size: processes of the job.
        unit: what the error calls them, such as "processes".
        advice: how to change their number; "{}" stands for the number that must divide it.

    Raises:
        UserError: naming the sizes whose product does not divide `world_size`.
    """
    for names in (("tensor", "pipeline", "context"), ("expert_tensor", "expert", "pipeline")):
        product = math.prod(getattr(parallel, name) for name in names)
        if world_size % product:
            raise UserError(
                f"{' x '.join(f'parallel.{name}' for name in names)} = {product} does not divide the {world_size} "
                f"{unit}: {advice.format(product)} or lower one of the three"
            )


def check_layout(hf_config: Any, parallel: ParallelConfig) -> None:
    """Refuse parallel sizes that do not divide the model.

    Raises:
        UserError: for the first size that does not divide the model; names both numbers.
    """
    _check_tensor(hf_config, parallel)
    _check_experts(hf_config, parallel)
    _check_stages(hf_config.num_hidden_layers, parallel)


def shorter_last_stage(layers: int, pipeline: int, chunks: int = 1) -> int | None:
    """Return the largest number of layers with which the last stage has at most as many as each of the others.

    Args:
        layers: layers of the model.
        pipeline: number of stages.
        chunks: model chunks per stage, which must divide the layers of every stage.

    Returns:
        None if there is no such number above 0.
    """
    of_others = -(-layers // (pipeline * chunks)) * chunks
    last = layers - of_others * (pipeline - 1)
    return last if last > 0 and last % chunks == 0 else None


def _check_stages(layers: int, parallel: ParallelConfig) -> None:
    chunks, last = parallel.virtual_pipeline, parallel.last_stage_layers
    shorter = shorter_last_stage(layers, parallel.pipeline, chunks)
    remedy = "choose a divisor" if shorter is None else f"choose a divisor, or set parallel.last_stage_layers={shorter}"
    if not last:
        stages = parallel.pipeline * chunks
        if layers % stages:
            name = "parallel.pipeline" + (" x parallel.virtual_pipeline" if chunks > 1 else "")
            raise UserError(f"{name}={stages} does not divide the model's {layers} layers: {remedy}")
        return
    others = parallel.pipeline - 1
    if last >= layers or (layers - last) % (others * chunks) or last % chunks:
        of_chunks = f" of {chunks} model chunks each" if chunks > 1 else ""
        raise UserError(
            f"parallel.last_stage_layers={last} leaves {max(0, layers - last)} of the model's {layers} layers to "
            f"{others} stages{of_chunks}, which do not divide them: "
            + (f"set it to {shorter}" if shorter else "change parallel.pipeline")
        )


def _check_tensor(hf_config: Any, parallel: ParallelConfig) -> None:
    heads = {
        "attention heads": hf_config.num_attention_heads,
        "key/value heads": hf_config.num_key_value_heads,
    }
    for name, count in heads.items():
        if count % parallel.tensor:
            raise UserError(
                f"parallel.tensor={parallel.tensor} does not divide the model's {count} {name}: choose a divisor"
            )
    for key, ranks, feed_forward in _feed_forward_sizes(hf_config, parallel):
        if feed_forward % ranks:
            raise UserError(
                f"parallel.{key}={ranks} does not divide the model's {feed_forward} feed-forward size: choose a divisor"
            )


def _feed_forward_sizes(hf_config: Any, parallel: ParallelConfig) -> list[tuple[str, int, int]]:
    """Return what splits each kind of feed-forward layer: a key of `parallel`, its ranks, and the size of the layer."""
    dense = ("tensor", parallel.tensor, hf_config.intermediate_size)
    if not is_mixture(hf_config):
        return [dense]
    settings = family_of(hf_config).settings(hf_config)
    sizes = [("expert_tensor", parallel.expert_tensor, settings["moe_ffn_hidden_size"])]
    if shared := settings.get("moe_shared_expert_intermediate_size"):
        sizes.append(("tensor", parallel.tensor, shared))
    return [*sizes, dense] if 0 in settings.get("moe_layer_freq", ()) else sizes


def _check_experts(hf_config: Any, parallel: ParallelConfig) -> None:
    if not is_mixture(hf_config):
        if parallel.expert > 1:
            raise UserError(f"parallel.expert={parallel.expert} but the model has no experts: set it to 1")
        return
    experts = family_of(hf_config).settings(hf_config)["num_moe_experts"]
    if experts % parallel.expert:
        raise UserError(
            f"parallel.expert={parallel.expert} does not divide the model's {experts} experts: choose a divisor"
        )
    if parallel.tensor > 1 and not parallel.sequence:
        raise UserError("a mixture of experts with parallel.tensor > 1 needs parallel.sequence=true: set it")
    if parallel.tensor > 1 and parallel.expert == 1 and parallel.expert_tensor != parallel.tensor:
        raise UserError(
            f"parallel.expert=1 with parallel.tensor={parallel.tensor} needs parallel.expert_tensor={parallel.tensor}: "
            "set it, or split the experts with parallel.expert"
        )


def check_routers(hf_config: Any, path: str) -> None:
    """Refuse to replay the routes of a model that has none; `path` is its folder.

    Raises:
        UserError: if the model has no experts.
    """
    if not is_mixture(hf_config):
        raise UserError(f"rollout.routing_replay=true but {path} has no experts: set rollout.routing_replay=false")
