"""A plan as text, in GiB and seconds."""

from __future__ import annotations

from megatron_rlvr.planning.batch import local_batch, longest_sequence, microbatches
from megatron_rlvr.planning.memory import CONTEXT_BYTES, GIB
from megatron_rlvr.planning.plan import Plan
from megatron_rlvr.planning.roofline import planned_weight_sync
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
    ]


def _memory_table(plan: Plan) -> list[str]:
    sglang = plan.config.rollout.sglang
    served = plan.config.rollout.engine == "sglang"
    lines = [
        "GiB of a rank    weights  gradients  optimizer | activations   head  working | "
        f"{'  server' if served else 'kv cache'}  gathered | context |    peak"
    ]
    for index, (stage, (static, phases)) in enumerate(zip(plan.stages, plan.memory, strict=True)):
        columns = [
            f"stage {index} ({stage.layers:3d} layers)".ljust(15),
            f"{static.weights / GIB:8.2f}",
            f"{static.gradients / GIB:10.2f}",
            f"{static.optimizer / GIB:10.2f} |",
            f"{phases.activations / GIB:11.2f}",
            f"{phases.head / GIB:6.2f}",
            f"{phases.feed_forward / GIB:8.2f} |",
            f"{(phases.cache + phases.server_weights) / GIB:8.2f}",
            f"{phases.export / GIB:9.2f} |",
            f"{CONTEXT_BYTES / GIB:7.2f} |",
            f"{plan.stage_bytes(index) / GIB:7.2f}",
        ]
        lines.append(" ".join(columns))
    if not served:
        sharing = "update (activations; head or working) and generation (cache, gathered tensor) alternate"
    elif sglang.release_memory:
        sharing = "SGLang servers release their memory for the update and resume it for the gathered tensor"
    else:
        sharing = "SGLang servers keep their weights during the update; update and gathered tensor alternate"
    return [*lines, f"{sharing}; the context is assumed."]


def _advice(plan: Plan) -> list[str]:
    config, shape = plan.config, plan.shape
    longest = longest_sequence(config)
    lines = []
    if local := _largest_local_batch(plan):
        lines.append(f"rollout.local_batch={local} would fit")
    if config.rollout.engine == "sglang" and plan.fits and not config.rollout.sglang.urls:
        gpus = ServerLayout.from_arguments(config.rollout.sglang.server).gpus_per_replica
        bytes_per_token = shape.layers * 2 * shape.key_value * plan.itemsize // gpus
        tokens = plan.spare_bytes / bytes_per_token
        lines.append(
            f"the spare memory of a server holds keys and values of {tokens:.0f} tokens, "
            f"{tokens / longest:.1f} sequences of the greatest length"
        )
    if config.parallel.distributed_optimizer:
        gathered = 12 * max(stage.count for stage in plan.stages) / GIB
        lines.append(
            f"saving a checkpoint gathers {gathered:.1f} GiB of optimizer state in the host memory of the first rank "
            "of every data-parallel group; loading it needs as much on every rank"
        )
    if longest > shape.positions:
        lines.append(
            f"warning: prompt and response of up to {longest} tokens exceed the {shape.positions} positions of the "
            "model (max_position_embeddings): lower rollout.max_tokens, or use a model whose config.json allows for "
            "more"
        )
    return lines


def _largest_local_batch(plan: Plan) -> int:
    """The `rollout.local_batch` that would make the plan fit, if only the cache is too large; otherwise 0."""
    static, phases = plan.memory[plan.worst]
    if plan.fits or plan.config.rollout.engine == "sglang" or phases.generation <= phases.update:
        return 0
    room = plan.hardware.memory_bytes - static.total - CONTEXT_BYTES - phases.export
    return max(0, int(room * local_batch(plan.config, plan.data_parallel) / phases.cache))


def _time(plan: Plan) -> list[str]:
    time, hardware = plan.time, plan.hardware
    phases = [f"{name.replace('_', '-')} {seconds:.1f}" for name, seconds in time.seconds_by_phase.items() if seconds]
    lines = [
        f"seconds per step at {time.response_tokens:.0f} response tokens: {time.total:.0f} = {', '.join(phases)}; "
        f"longest: {time.dominant.replace('_', '-')}",
        f"from {hardware.flops / 1e12:.0f} TFLOP/s x {hardware.compute_share}, "
        f"{hardware.memory_rate / 1e12:.2f} TB/s x {hardware.memory_share}, links of "
        f"{hardware.nvlink_rate / 1e9:.0f} and {hardware.network_rate / 1e9:.0f} GB/s x {hardware.link_share}",
    ]
    if plan.config.rollout.engine == "sglang":
        transport = {
            "tensor": "through shared memory, over NVLink",
            "distributed": "by a broadcast over the network",
            "disk": f"through a shared file system of {hardware.disk_rate / 1e9:.0f} GB/s, assumed",
        }[planned_weight_sync(plan.config.rollout.sglang.weight_sync, plan.nodes)]
        weights = plan.shape.parameters * plan.itemsize / 1e9
        lines.append(f"weights to the servers: {weights:.1f} GB {transport}, without the overhead of requests")
    return lines
