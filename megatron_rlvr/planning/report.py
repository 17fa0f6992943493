"""A plan as text, in GiB and seconds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from megatron_rlvr.planning.batch import local_batch, longest_sequence, microbatches
from megatron_rlvr.planning.exchanges import CHANGED_SHARE
from megatron_rlvr.planning.job import ASSUMED_UTILISATION, MEASURED_UTILISATION
from megatron_rlvr.planning.memory import CONTEXT_BYTES, GIB, StageMemory, peak_bytes, static_memory
from megatron_rlvr.planning.plan import Plan
from megatron_rlvr.planning.servers import served_bytes
from megatron_rlvr.planning.suggestions import Suggestion
from megatron_rlvr.rollout.engines.sglang.launch_arguments import ServerLayout


def describe(plan: Plan) -> str:
    """The whole plan: layout, memory of every stage, verdict, advice, and the time of a step."""
    lines = [*_layout(plan), "", *_memory_table(plan), verdict(plan), *_advice(plan), "", *_time(plan)]
    return "\n".join(lines)


def verdict(plan: Plan) -> str:
    """Whether the plan fits, in one line."""
    needed, available = plan.stage_bytes(plan.worst) / GIB, plan.hardware.memory_bytes / GIB
    return (
        f"{'fits' if plan.fits else 'does NOT fit'}: stage {plan.worst} needs {needed:.1f} of {available:.1f} GiB, "
        f"{abs(plan.spare_bytes) / GIB:.1f} GiB {'spare' if plan.fits else 'too many'}; largest: {plan.dominant}"
        + ("" if plan.fits else "; tools/plan.py --suggest lists layouts that fit")
    )


def layout_name(plan: Plan) -> str:
    """The layout in a few words."""
    parallel = plan.config.parallel
    words = [f"tensor {parallel.tensor}", f"pipeline {parallel.pipeline}", f"data {plan.data_parallel}"]
    for name in ("context", "expert", "expert_tensor", "virtual_pipeline"):
        if (size := getattr(parallel, name)) > 1:
            words.append(f"{name.replace('_', ' ')} {size}")
    if parallel.sequence:
        words.append("sequence parallel")
    if parallel.recompute == "full":
        words.append("full recomputation")
    words.append("distributed optimizer" if parallel.distributed_optimizer else "full optimizer on every data rank")
    return ", ".join(words)


def _layout(plan: Plan) -> list[str]:
    config = plan.config
    micro = microbatches(config, plan.data_parallel)
    recompute = {"none": "no", "full": "full", "selective": "selective"}[config.parallel.recompute]
    head = "fused" if config.algorithm.fused_linear else "plain"
    return [
        f"{config.name}: {plan.shape.parameters / 1e9:.2f} B parameters on {plan.nodes} x {plan.gpus_per_node} "
        f"{plan.hardware.name}; every number is computed, none measured",
        f"layout: {layout_name(plan)}; {micro.count} microbatches of {micro.sequences} sequences of up to "
        f"{longest_sequence(config)} tokens, {recompute} recomputation, {head} head",
        *_adapters(plan),
    ]


def _adapters(plan: Plan) -> list[str]:
    lora, shape = plan.config.lora, plan.shape
    if not lora.rank:
        return []
    return [
        f"adapters of rank {lora.rank} on {', '.join(lora.target_modules)}: {shape.adapters / 1e6:.0f} M "
        f"parameters{' per token' if shape.experts else ''} are trained, and {shape.parameters / 1e9:.2f} B are frozen"
    ]


def _memory_table(plan: Plan) -> list[str]:
    shared = plan.servers.placement == "colocated"
    lines = [
        "GiB of a rank    weights  gradients  optimizer | activations   head  working | "
        f"{'  server' if shared else 'kv cache'}  gathered | context |    peak"
    ]
    for index, (stage, (static, phases)) in enumerate(zip(plan.stages, plan.memory, strict=True)):
        columns = [
            f"stage {index} ({stage.layers:3d} layers)".ljust(15),
            f"{(static.weights + static.reference) / GIB:8.2f}",
            f"{static.gradients / GIB:10.2f}",
            f"{static.optimizer / GIB:10.2f} |",
            f"{phases.activations / GIB:11.2f}",
            f"{phases.head / GIB:6.2f}",
            f"{phases.feed_forward / GIB:8.2f} |",
            f"{(phases.cache + phases.server) / GIB:8.2f}",
            f"{phases.export / GIB:9.2f} |",
            f"{(CONTEXT_BYTES + phases.server_runtime) / GIB:7.2f} |",
            f"{plan.stage_bytes(index) / GIB:7.2f}",
        ]
        lines.append(" ".join(columns))
    if not shared:
        sharing = "update (activations; head or working) and generation (cache, gathered tensor) alternate"
    elif plan.config.rollout.sglang.release_memory:
        sharing = "SGLang servers release their memory for the update and resume it for the gathered tensor"
    else:
        sharing = "SGLang servers keep their memory during the update; update and gathered tensor alternate"
    return [*lines, f"{sharing}; the context is assumed{', with that of the server' if shared else ''}."]


def _advice(plan: Plan) -> list[str]:
    config = plan.config
    lines = []
    if local := _largest_local_batch(plan):
        lines.append(f"rollout.local_batch={local} would fit")
    if plan.load is not None and math.isfinite(plan.load.concurrent):
        lines.append(
            f"the cache of a server holds {plan.load.concurrent:.0f} of its {plan.load.sequences:.0f} sequences at "
            f"once: {plan.load.waves:.1f} waves"
        )
    server = ServerLayout.from_arguments(config.rollout.sglang.server)
    if plan.load is not None and server.gpus > plan.gpus_per_node:
        lines.append(
            f"a server of {server.gpus} GPUs spans {-(-server.gpus // plan.gpus_per_node)} nodes: start it outside the "
            "job, and name it in rollout.sglang.urls"
        )
    if plan.server_share is not None:
        lines.append(f"the largest rollout.sglang.server.mem_fraction_static that fits: {plan.server_share}")
    lines += _reference(plan)
    if config.parallel.distributed_optimizer:
        stored = torch.bfloat16  # a checkpoint has 12 bytes per parameter, of float32 weights, too
        own = max(static_memory(s, config.parallel, stored, plan.data_parallel).optimizer for s in plan.stages) / GIB
        lines.append(
            f"a checkpoint: every rank writes and loads its own {own:.1f} GiB of optimizer state, through host memory; "
            "nothing is gathered"
        )
    return lines


def _reference(plan: Plan) -> list[str]:
    """Where the weights of the reference are; nothing without one."""
    needed = plan.reference_bytes
    if needed.held:
        return [f"the weights include {needed.held / GIB:.2f} GiB of the reference (reference.weights=device)"]
    if not needed.scoring:
        return []
    source = "read from the disk"
    if needed.host:
        source = f"copied from {needed.host * plan.gpus_per_node / GIB:.0f} GiB of host memory per node"
    sets = "sets" if _reference_sets_peak(plan) else "does not set"
    return [f"the reference: {needed.scoring / GIB:.2f} GiB while it is scored, {source}; it {sets} the peak"]


def _reference_sets_peak(plan: Plan) -> bool:
    """Whether a rank would need less if the reference were not scored."""
    released = plan.config.rollout.sglang.release_memory
    without = [(static, replace(phases, scoring=0)) for static, phases in plan.memory]
    return max(peak_bytes(StageMemory(*stage), released) for stage in without) < plan.stage_bytes(plan.worst)


def _largest_local_batch(plan: Plan) -> int:
    """The `rollout.local_batch` that would make the plan fit, if only the cache is too large; otherwise 0."""
    static, phases = plan.memory[plan.worst]
    if plan.fits or plan.config.rollout.engine == "sglang" or phases.generation <= phases.training:
        return 0
    room = plan.hardware.memory_bytes - static.total - CONTEXT_BYTES - phases.export
    return max(0, int(room * local_batch(plan.config, plan.data_parallel) / phases.cache))


def _time(plan: Plan) -> list[str]:
    measured, optimistic, hardware = plan.time, plan.optimistic_time, plan.hardware
    lines = [
        f"seconds per step at {measured.response_tokens:.0f} response tokens, with compute at a share of the peak:",
        f"  {'':17}{hardware.compute_share:8.0%}{ASSUMED_UTILISATION:8.0%}",
    ]
    for name, seconds in measured.seconds_by_phase.items():
        if seconds:
            other = optimistic.seconds_by_phase[name]
            lines.append(f"  {name.replace('_', '-'):17}{seconds:8.1f}{other:8.1f}")
    if measured.overlapped:
        lines.append(f"  {'overlapped':17}{-measured.hidden:8.1f}{-optimistic.hidden:8.1f}")
    lines += [
        f"  {'step':17}{measured.total:8.1f}{optimistic.total:8.1f}   longest: {measured.dominant.replace('_', '-')}",
        f"{MEASURED_UTILISATION:.0%} was measured for training and log-probs of a 70B model on 64 H100 (issue 959 of "
        f"NeMo-RL), {ASSUMED_UTILISATION:.0%} is assumed",
        f"from {hardware.flops / 1e12:.0f} TFLOP/s, {hardware.memory_rate / 1e12:.2f} TB/s x {hardware.memory_share}, "
        f"links of {hardware.nvlink_rate / 1e9:.0f} and {hardware.network_rate / 1e9:.0f} GB/s x {hardware.link_share}",
    ]
    if plan.config.rollout.engine == "sglang":
        weights = served_bytes(plan.shape, plan.config, plan.itemsize) / 1e9
        sglang = plan.config.rollout.sglang
        transport = {
            "tensor": "through shared memory on every node",
            "distributed": "by a broadcast over the network",
            "disk": f"through a shared file system of {hardware.disk_rate / 1e9:.0f} GB/s, assumed",
            "delta": f"as deltas of {CHANGED_SHARE:.0%} of the elements, assumed, through a shared file system of "
            f"{hardware.disk_rate / 1e9:.0f} GB/s; every node needs {2 * weights:.0f} GB in {sglang.local_folder}",
        }[sglang.weight_sync]
        lines.append(f"weights to the servers: {weights:.1f} GB {transport}, without the overhead of requests")
    return lines


def describe_suggestions(suggestions: Sequence[Suggestion]) -> str:
    """Layouts that fit, in the order of `suggest`, each with the overrides that select it."""
    if not suggestions:
        return "no layout fits: use more nodes, shorter responses, or servers on other nodes (--servers nodes:N)"
    lines = ["layouts that fit, the most room for sequences first, then the fastest:"]
    for suggestion in suggestions:
        plan, load = suggestion.plan, suggestion.plan.load
        held = ""
        if load is not None and math.isfinite(load.concurrent):
            held = f"{load.concurrent:.0f} of {load.sequences:.0f} sequences in a server's cache; "
        lines += [
            f"  {plan.time.total:7.0f} s  {plan.stage_bytes(plan.worst) / GIB:6.1f} GiB  {held}{layout_name(plan)}",
            f"             {' '.join(suggestion.overrides)}",
        ]
    return "\n".join(lines)
