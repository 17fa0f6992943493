"""A plan: memory of every pipeline stage and time of a step, as numbers and as text."""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_rlvr.config import Config, check
from megatron_rlvr.errors import UserError
from megatron_rlvr.megatron.stage_shapes import ModelShape, Stage, model_stages
from megatron_rlvr.planning.memory import (
    CONTEXT_BYTES,
    GIB,
    Phases,
    Static,
    microbatch,
    phase_memory,
    static_memory,
    weight_sync,
)
from megatron_rlvr.planning.roofline import Hardware, StepTime, step_time
from megatron_rlvr.rollout.engines.sglang.launch_arguments import ServerLayout


@dataclass(frozen=True)
class Plan:
    """What a configuration needs on a number of GPUs.

    Attributes:
        memory: of every stage: static bytes and what the phases add.
        data_parallel: data-parallel ranks.
    """

    config: Config
    nodes: int
    gpus_per_node: int
    data_parallel: int
    shape: ModelShape
    stages: list[Stage]
    memory: list[tuple[Static, Phases]]
    time: StepTime
    hardware: Hardware

    def stage_bytes(self, index: int) -> int:
        """The largest memory of a rank of this stage, with the assumed context."""
        static, phases = self.memory[index]
        if (
            self.config.rollout.engine == "sglang"
        ):  # the servers' weights stay while the policy is updated, or make room
            beside = 0 if self.config.rollout.sglang.release_memory else phases.cache
            return static.total + max(beside + phases.update, phases.cache + phases.sync) + CONTEXT_BYTES
        return static.total + max(phases.update, phases.generation) + CONTEXT_BYTES

    @property
    def worst(self) -> int:
        """The stage that needs most."""
        return max(range(len(self.stages)), key=self.stage_bytes)

    @property
    def spare_bytes(self) -> float:
        """What the fullest GPU has left; negative when the configuration does not fit."""
        return self.hardware.memory_bytes - self.stage_bytes(self.worst)

    @property
    def fits(self) -> bool:
        return self.spare_bytes >= 0

    @property
    def dominant(self) -> str:
        """What takes most memory on the fullest rank."""
        static, phases = self.memory[self.worst]
        parts = {
            "weights": static.weights,
            "gradients": static.gradients,
            "optimizer": static.optimizer,
            "activations": phases.activations,
            "logits and head": phases.head,
            "gradients of a layer": phases.working,
        }
        if self.config.rollout.engine == "sglang":
            parts["server weights"] = phases.cache
        elif phases.generation > phases.update:
            parts = {k: v for k, v in parts.items() if k in ("weights", "gradients", "optimizer")}
            parts |= {"key/value cache": phases.cache, "gathered tensor": phases.sync}
        return max(parts, key=lambda name: parts[name])


def make_plan(
    config: Config, nodes: int, gpus_per_node: int, hardware: Hardware | None = None, response_share: float = 0.5
) -> Plan:
    """Plan `config` on ``nodes * gpus_per_node`` GPUs.

    Raises:
        UserError: when the layout does not divide the model, the job or the batch.
    """
    hardware = hardware or Hardware()
    world_size = nodes * gpus_per_node
    shape, dtype, stages = model_stages(config.model, config.parallel, world_size)
    parallel, rollout = config.parallel, config.rollout
    data_parallel = world_size // (parallel.tensor * parallel.pipeline * parallel.context)
    if rollout.prompts_per_step % (data_parallel * config.algorithm.minibatches):
        raise UserError(
            f"rollout.prompts_per_step={rollout.prompts_per_step} is no multiple of {data_parallel} data-parallel "
            f"ranks x algorithm.minibatches={config.algorithm.minibatches}: every rank needs as many whole groups in "
            "every minibatch"
        )
    memory = [
        (
            static_memory(stage, config, dtype, data_parallel),
            phase_memory(shape, stage, config, dtype.itemsize, data_parallel),
        )
        for stage in stages
    ]
    time = step_time(shape, stages, config, dtype.itemsize, data_parallel, gpus_per_node, hardware, response_share)
    return Plan(config, nodes, gpus_per_node, data_parallel, shape, stages, memory, time, hardware)


def suggest(config: Config, nodes: int, gpus_per_node: int, hardware: Hardware, response_share: float) -> list[Plan]:
    """Plans of other layouts that fit, the fastest first: tensor sizes within a node, pipeline sizes up to 16.

    A layout that does not fit as it is may do so with full recomputation.
    """
    found = []
    for tensor in (1, 2, 4, 8):
        for pipeline in (1, 2, 4, 5, 8, 10, 16):
            if tensor > gpus_per_node:
                continue
            layout = replace(
                config.parallel,
                tensor=tensor,
                pipeline=pipeline,
                sequence=tensor > 1,
                distributed_optimizer=True,
                microbatch_sequences=1,
            )
            for recompute in dict.fromkeys((config.parallel.recompute, "full")):
                other = replace(config, parallel=replace(layout, recompute=recompute))
                try:
                    check(other)
                    plan = make_plan(other, nodes, gpus_per_node, hardware, response_share)
                except UserError:  # a layout that does not divide is no suggestion
                    break
                if plan.fits:
                    found.append(plan)
                    break
    return sorted(found, key=lambda plan: plan.time.total)


def describe(plan: Plan) -> str:
    """The plan as text, GiB and seconds."""
    config, shape = plan.config, plan.shape
    sequences, microbatches = microbatch(config, plan.data_parallel)
    width = config.data.max_prompt_tokens + config.rollout.max_tokens
    recompute = {"none": "no", "full": "full", "selective": "selective"}[config.parallel.recompute]
    served = config.rollout.engine == "sglang"
    head = "fused" if config.algorithm.fused_linear else "plain"
    lines = [
        f"{config.name}: {shape.parameters / 1e9:.2f} B parameters on {plan.nodes} x {plan.gpus_per_node} "
        f"{plan.hardware.name}; every number is computed, none measured",
        f"layout: {layout_name(plan)}; {microbatches} microbatches of {sequences} sequences of up to "
        f"{width} tokens, {recompute} recomputation, {head} head",
        "",
        "GiB of a rank    weights  gradients  optimizer | activations   head  working | "
        f"{'  server' if served else 'kv cache'}  gathered | context |    peak",
    ]
    for index, (stage, (static, phases)) in enumerate(zip(plan.stages, plan.memory, strict=True)):
        numbers = [
            f"stage {index} ({stage.layers:3d} layers)".ljust(15),
            f"{static.weights / GIB:8.2f}",
            f"{static.gradients / GIB:10.2f}",
            f"{static.optimizer / GIB:10.2f} |",
            f"{phases.activations / GIB:11.2f}",
            f"{phases.head / GIB:6.2f}",
            f"{phases.working / GIB:8.2f} |",
            f"{phases.cache / GIB:8.2f}",
            f"{phases.sync / GIB:9.2f} |",
            f"{CONTEXT_BYTES / GIB:7.2f} |",
            f"{plan.stage_bytes(index) / GIB:7.2f}",
        ]
        lines.append(" ".join(numbers))
    available = plan.hardware.memory_bytes / GIB
    verdict = "fits" if plan.fits else "does NOT fit"
    spare = abs(plan.spare_bytes) / GIB
    turns = "update (activations, head or working) and generation (cache, gathered tensor) take turns"
    if served:
        turns = "SGLang servers keep their weights beside the policy; update and gathered tensor take turns"
        if config.rollout.sglang.release_memory:
            turns = "SGLang servers make room for the update; their weights are back beside the gathered tensor"
    lines += [
        f"{turns}; the context is assumed.",
        f"{verdict}: stage {plan.worst} needs {plan.stage_bytes(plan.worst) / GIB:.1f} of {available:.1f} GiB, "
        f"{spare:.1f} GiB {'spare' if plan.fits else 'too many'}; most of it {plan.dominant}",
    ]
    static, phases = plan.memory[plan.worst]
    if phases.generation > phases.update and not plan.fits and not served:
        room = plan.hardware.memory_bytes - static.total - CONTEXT_BYTES - phases.sync
        cached = min(
            config.rollout.local_batch,
            config.rollout.prompts_per_step * config.rollout.samples_per_prompt // plan.data_parallel,
        )
        fitting = int(room * cached / phases.cache) if room > 0 else 0
        if fitting:
            lines.append(f"rollout.local_batch={fitting} would fit")
    if served and plan.fits and not config.rollout.sglang.urls:
        gpus = ServerLayout.from_arguments(config.rollout.sglang.server).gpus_per_replica
        a_token = shape.layers * 2 * shape.key_value * 2 // gpus
        lines.append(
            f"the spare memory of a server holds keys and values of {plan.spare_bytes / a_token:.0f} tokens: "
            f"{plan.spare_bytes / a_token / width:.1f} of the longest sequences"
        )
    if config.parallel.distributed_optimizer:
        gathered = 12 * max(stage.count for stage in plan.stages) / GIB
        lines.append(
            f"a checkpoint gathers {gathered:.1f} GiB of optimizer state in the host memory of every first "
            "data-parallel rank, and as much on every rank when it is loaded"
        )
    if width > shape.positions:
        lines.append(
            f"warning: prompt and response of up to {width} tokens exceed the {shape.positions} positions of the model "
            "(max_position_embeddings): lower rollout.max_tokens, or use a model whose config.json allows for more"
        )
    time = plan.time
    lines += [
        "",
        f"seconds of a step at {time.response_tokens:.0f} response tokens: {time.total:.0f} = "
        + ", ".join(f"{name.replace('_', '-')} {value:.1f}" for name, value in time.parts.items() if value)
        + f"; most of it {time.dominant.replace('_', '-')}",
        f"from {plan.hardware.flops / 1e12:.0f} TFLOP/s x {plan.hardware.compute_share}, "
        f"{plan.hardware.memory_rate / 1e12:.2f} TB/s x {plan.hardware.memory_share}, links of "
        f"{plan.hardware.nvlink_rate / 1e9:.0f} and {plan.hardware.network_rate / 1e9:.0f} GB/s x "
        f"{plan.hardware.link_share}",
    ]
    if served:
        way = {
            "tensor": "through shared memory, over NVLink",
            "distributed": "by a broadcast over the network",
            "disk": f"through a shared file system of {plan.hardware.disk_rate / 1e9:.0f} GB/s, assumed",
        }[weight_sync(config, plan.nodes)]
        whole = shape.parameters * 2 / 1e9
        lines.append(f"weights to the servers: {whole:.1f} GB {way}; what requests cost beside the bytes is left out")
    return "\n".join(lines)


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
    words.append("distributed optimizer" if parallel.distributed_optimizer else "whole optimizer on every data rank")
    return ", ".join(words)
