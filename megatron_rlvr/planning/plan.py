"""A plan: the memory of every pipeline stage, and the time of a step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from megatron_rlvr.config import Config, check, resolve
from megatron_rlvr.errors import UserError
from megatron_rlvr.megatron.config import ParallelConfig
from megatron_rlvr.megatron.stage_shapes import ModelShape, Stage, model_stages
from megatron_rlvr.planning.memory import CONTEXT_BYTES, PhaseMemory, StaticMemory, phase_memory, static_memory
from megatron_rlvr.planning.roofline import Hardware, Job, StepTime, step_time


class StageMemory(NamedTuple):
    """Bytes of a rank of one pipeline stage."""

    static: StaticMemory
    phases: PhaseMemory


@dataclass(frozen=True)
class Plan:
    """What a configuration needs on a number of GPUs.

    Attributes:
        config: the planned configuration, with every ``auto`` resolved for GPUs.
        data_parallel: number of data-parallel ranks.
        itemsize: bytes per element of weights and activations.
        memory: bytes of a rank of each pipeline stage.
    """

    config: Config
    nodes: int
    gpus_per_node: int
    data_parallel: int
    itemsize: int
    shape: ModelShape
    stages: list[Stage]
    memory: list[StageMemory]
    time: StepTime
    hardware: Hardware

    def stage_bytes(self, index: int) -> int:
        """Peak bytes of a rank of this stage, including the assumed CUDA context."""
        static, phases = self.memory[index]
        servers_stay = not self.config.rollout.sglang.release_memory
        update = phases.update + (phases.server_weights if servers_stay else 0)
        return static.total + max(update, phases.generation) + CONTEXT_BYTES

    @property
    def worst(self) -> int:
        """The index of the stage that needs the most memory."""
        return max(range(len(self.stages)), key=self.stage_bytes)

    @property
    def spare_bytes(self) -> float:
        """Bytes that the fullest GPU has left; negative if the configuration does not fit."""
        return self.hardware.memory_bytes - self.stage_bytes(self.worst)

    @property
    def fits(self) -> bool:
        return self.spare_bytes >= 0

    @property
    def dominant(self) -> str:
        """What takes the most memory on the fullest rank."""
        static, phases = self.memory[self.worst]
        needs = {"weights": static.weights, "gradients": static.gradients, "optimizer": static.optimizer}
        update = {
            "activations": phases.activations,
            "logits and head": phases.head,
            "gradients of a layer": phases.feed_forward,
        }
        generation = {"key/value cache": phases.cache, "gathered tensor": phases.export}
        if self.config.rollout.engine == "sglang":
            needs |= update | {"server weights": phases.server_weights}
        else:
            needs |= generation if phases.generation > phases.update else update
        return max(needs, key=lambda name: needs[name])


def make_plan(
    config: Config, nodes: int, gpus_per_node: int, hardware: Hardware | None = None, response_share: float = 0.5
) -> Plan:
    """Plan `config` on ``nodes * gpus_per_node`` GPUs.

    Args:
        config: the configuration to plan.
        nodes: number of nodes.
        gpus_per_node: number of GPUs per node.
        hardware: rates and memory of a GPU; an H100 by default.
        response_share: mean length of prompts and responses, as a share of the greatest.

    Raises:
        UserError: if the layout does not divide the model, the job or the batch.
    """
    config = resolve(config, on_gpu=True)
    hardware = hardware or Hardware()
    world_size = nodes * gpus_per_node
    shape, dtype, stages = model_stages(config.model, config.parallel, world_size)
    parallel, rollout = config.parallel, config.rollout
    data_parallel = world_size // (parallel.tensor * parallel.pipeline * parallel.context)
    if rollout.prompts_per_step % (data_parallel * config.algorithm.minibatches):
        raise UserError(
            f"rollout.prompts_per_step={rollout.prompts_per_step} is not a multiple of {data_parallel} data-parallel "
            f"ranks x algorithm.minibatches={config.algorithm.minibatches}: choose a multiple, so that every rank has "
            "the same number of whole groups in every minibatch"
        )
    memory = [
        StageMemory(
            static_memory(stage, parallel, dtype, data_parallel, config.optimizer.cpu_offload),
            phase_memory(shape, stage, config, dtype.itemsize, data_parallel),
        )
        for stage in stages
    ]
    job = Job(config, shape, stages, dtype.itemsize, data_parallel, gpus_per_node, hardware, response_share)
    return Plan(
        config=config,
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        data_parallel=data_parallel,
        itemsize=dtype.itemsize,
        shape=shape,
        stages=stages,
        memory=memory,
        time=step_time(job),
        hardware=hardware,
    )


def suggest(config: Config, nodes: int, gpus_per_node: int, hardware: Hardware, response_share: float) -> list[Plan]:
    """Plan other layouts and return those that fit, the fastest first.

    A layout that does not fit is tried again with full recomputation. The arguments are those of `make_plan`.
    """
    fitting = []
    for layout in _layouts(config.parallel, gpus_per_node):
        for recompute in dict.fromkeys((config.parallel.recompute, "full")):
            candidate = replace(config, parallel=replace(layout, recompute=recompute))
            try:
                check(candidate)
                plan = make_plan(candidate, nodes, gpus_per_node, hardware, response_share)
            except UserError:  # the layout does not divide the model, the job or the batch
                break
            if plan.fits:
                fitting.append(plan)
                break
    return sorted(fitting, key=lambda plan: plan.time.total)


def _layouts(parallel: ParallelConfig, gpus_per_node: int) -> Iterator[ParallelConfig]:
    """Tensor-parallel sizes within a node, combined with pipeline-parallel sizes up to 16."""
    for tensor in (1, 2, 4, 8):
        for pipeline in (1, 2, 4, 5, 8, 10, 16):
            if tensor <= gpus_per_node:
                yield replace(
                    parallel,
                    tensor=tensor,
                    pipeline=pipeline,
                    sequence=tensor > 1,
                    distributed_optimizer=True,
                    microbatch_sequences=1,
                )
