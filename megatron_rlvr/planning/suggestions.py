"""Other layouts of a configuration that fit, ranked, with the overrides that select them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_rlvr.config import Config, check
from megatron_rlvr.errors import UserError
from megatron_rlvr.megatron.config import ParallelConfig
from megatron_rlvr.megatron.huggingface_config import read_config
from megatron_rlvr.megatron.layout_checks import shorter_last_stage
from megatron_rlvr.planning.job import Hardware
from megatron_rlvr.planning.plan import Plan, make_plan
from megatron_rlvr.planning.servers import Servers
from megatron_rlvr.rollout.engines.sglang.launch_arguments import normalized


@dataclass(frozen=True)
class Suggestion:
    """A layout that fits.

    Attributes:
        plan: its plan.
        overrides: what selects it, as ``key=value``.
    """

    plan: Plan
    overrides: list[str]


def suggest(
    config: Config,
    nodes: int,
    gpus_per_node: int,
    hardware: Hardware,
    response_share: float,
    servers: Servers | None = None,
) -> list[Suggestion]:
    """Plan other layouts and return those that fit; the arguments are those of `make_plan`.

    The first ones leave the servers the most room for sequences, until all of a step fit at once; among equals, the
    fastest is first. Colocated servers get the largest ``mem_fraction_static`` that fits. A batch that a layout
    does not divide is replaced by the nearest one that it divides. A layout that does not fit is tried again with full
    recomputation.
    """
    fitting = []
    layers = read_config(Path(config.model.path)).num_hidden_layers
    for layout in _layouts(config.parallel, gpus_per_node, layers):
        for recompute in dict.fromkeys((config.parallel.recompute, "full")):
            candidate = replace(config, parallel=replace(layout, recompute=recompute))
            try:
                suggestion = _fitted(candidate, nodes, gpus_per_node, hardware, response_share, servers)
            except UserError:  # the layout does not divide the model or the job
                break
            if suggestion is not None:
                fitting.append(suggestion)
    return sorted(fitting, key=_rank)


def _rank(suggestion: Suggestion) -> tuple[float, float]:
    load = suggestion.plan.load
    return (load.waves if load is not None else 1.0, suggestion.plan.time.total)


def _fitted(
    config: Config,
    nodes: int,
    gpus_per_node: int,
    hardware: Hardware,
    response_share: float,
    servers: Servers | None,
) -> Suggestion | None:
    """Return a layout with a batch that divides and a server share that fits; None if it does not fit."""
    parallel, rollout = config.parallel, config.rollout
    ranks = nodes * gpus_per_node // (parallel.tensor * parallel.pipeline * parallel.context)
    multiple = max(1, ranks) * config.algorithm.minibatches
    prompts = max(multiple, round(rollout.prompts_per_step / multiple) * multiple)
    # Without a share of its own the plan gives the servers all that is left.
    arguments = {k: v for k, v in rollout.sglang.server.items() if k.replace("-", "_") != "mem_fraction_static"}
    own_share = normalized(rollout.sglang.server).get("mem_fraction_static")
    servers = servers or Servers.of_job(config, None)
    shared = servers.placement == "colocated"
    sglang = replace(rollout.sglang, server=arguments) if shared else rollout.sglang
    config = replace(config, rollout=replace(rollout, prompts_per_step=prompts, sglang=sglang))
    check(config)
    plan = make_plan(config, nodes, gpus_per_node, hardware, response_share, servers)
    if not plan.fits:
        return None
    overrides = [f"parallel.{name}={_text(getattr(parallel, name))}" for name in _CHOSEN]
    if parallel.last_stage_layers:
        overrides.append(f"parallel.last_stage_layers={parallel.last_stage_layers}")
    if prompts != rollout.prompts_per_step:
        overrides.append(f"rollout.prompts_per_step={prompts}")
    if shared and plan.server_share is not None:
        arguments = {**arguments, "mem_fraction_static": plan.server_share}
        config = replace(config, rollout=replace(config.rollout, sglang=replace(sglang, server=arguments)))
        plan = make_plan(config, nodes, gpus_per_node, hardware, response_share, servers)
        if not plan.fits or plan.load is None or plan.load.concurrent <= 1:
            return None
        if own_share != plan.server_share:
            overrides.append(f"rollout.sglang.server.mem_fraction_static={plan.server_share}")
    return Suggestion(plan, overrides)


_CHOSEN = (
    "tensor",
    "pipeline",
    "context",
    "sequence",
    "distributed_optimizer",
    "microbatch_sequences",
    "microbatch_tokens",
    "recompute",
)
"""Keys of the section ``parallel`` that a suggestion sets."""


def _last_stage(layers: int, pipeline: int, chunks: int) -> int:
    even = layers % (pipeline * chunks) == 0
    return 0 if even else shorter_last_stage(layers, pipeline, chunks) or 0


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _layouts(parallel: ParallelConfig, gpus_per_node: int, layers: int) -> Iterator[ParallelConfig]:
    """Tensor-parallel sizes within a node, with pipeline-parallel sizes up to 16 and context-parallel sizes up to 4.

    The last stage has fewer layers if the stages do not divide the model's `layers`.
    """
    for tensor, pipeline, context in itertools.product((1, 2, 4, 8), (1, 2, 4, 5, 8, 10, 16), (1, 2, 4)):
        if tensor <= gpus_per_node:
            yield replace(
                parallel,
                tensor=tensor,
                pipeline=pipeline,
                last_stage_layers=_last_stage(layers, pipeline, parallel.virtual_pipeline),
                context=context,
                sequence=tensor > 1,
                distributed_optimizer=True,
                microbatch_sequences=0 if parallel.microbatch_tokens else 1,
            )
