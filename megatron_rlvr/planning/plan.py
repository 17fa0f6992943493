"""A plan: the memory of every pipeline stage, and the time of a step."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_rlvr.config import Config, resolve
from megatron_rlvr.errors import UserError
from megatron_rlvr.megatron.huggingface_config import read_config
from megatron_rlvr.megatron.layout_checks import check_routers
from megatron_rlvr.megatron.stage_shapes import ModelShape, Stage, model_stages
from megatron_rlvr.planning.generation import ServerLoad, server_load
from megatron_rlvr.planning.job import ASSUMED_UTILISATION, Hardware, Job
from megatron_rlvr.planning.memory import StageMemory, peak_bytes, phase_memory, server_room, static_memory
from megatron_rlvr.planning.reference import ReferenceMemory, reference_memory
from megatron_rlvr.planning.roofline import StepTime, step_time
from megatron_rlvr.planning.servers import SERVER_RUNTIME_BYTES, Servers, cached_tokens, memory_fraction
from megatron_rlvr.rollout.engines.sglang.launch_arguments import ServerLayout
from megatron_rlvr.rollout.requirements import check_context, check_engine, check_groups


@dataclass(frozen=True)
class Plan:
    """What a configuration needs on a number of GPUs.

    Attributes:
        config: the planned configuration, with every ``auto`` resolved for GPUs.
        nodes: nodes that train.
        servers: where the SGLang servers run.
        data_parallel: number of data-parallel ranks.
        itemsize: bytes per element of weights and activations.
        memory: bytes of a rank of each pipeline stage.
        time: seconds of a step at the measured utilisation, `Hardware.compute_share`.
        optimistic_time: the same at `ASSUMED_UTILISATION`.
        load: sequences on a replica of a server; None without servers.
    """

    config: Config
    nodes: int
    gpus_per_node: int
    servers: Servers
    data_parallel: int
    itemsize: int
    shape: ModelShape
    stages: list[Stage]
    memory: list[StageMemory]
    time: StepTime
    optimistic_time: StepTime
    load: ServerLoad | None
    hardware: Hardware

    def stage_bytes(self, index: int) -> int:
        """Peak bytes of a rank of this stage, including the assumed CUDA context and that of a server next to it."""
        return peak_bytes(self.memory[index], self.config.rollout.sglang.release_memory)

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
    def reference_bytes(self) -> ReferenceMemory:
        """The most that a rank needs for the weights of the reference."""
        return max(
            (reference_memory(s, self.config, self.itemsize) for s in self.stages), key=lambda m: m.held + m.scoring
        )

    @property
    def server_share(self) -> float | None:
        """The largest ``mem_fraction_static`` that fits next to training, in hundredths; None without such servers."""
        if self.servers.placement != "colocated":
            return None
        released = self.config.rollout.sglang.release_memory
        room = server_room(self.memory, self.hardware.memory_bytes, released)
        return max(0.0, math.floor(100 * room / self.hardware.memory_bytes) / 100)

    @property
    def dominant(self) -> str:
        """What takes the most memory on the fullest rank."""
        static, phases = self.memory[self.worst]
        needs = {"weights": static.weights, "gradients": static.gradients, "optimizer": static.optimizer}
        needs["reference"] = static.reference + phases.scoring
        update = {
            "activations": phases.activations,
            "logits and head": phases.head,
            "gradients of a layer": phases.feed_forward,
        }
        generation = {"key/value cache": phases.cache, "gathered tensor": phases.export}
        if self.config.rollout.engine == "sglang":
            needs |= update | {"servers": phases.server + phases.server_runtime}
        else:
            needs |= generation if phases.generation > phases.training else update
        return max(needs, key=lambda name: needs[name])


def make_plan(
    config: Config,
    nodes: int,
    gpus_per_node: int,
    hardware: Hardware | None = None,
    response_share: float = 0.5,
    servers: Servers | None = None,
    on_gpu: bool = True,
) -> Plan:
    """Plan `config` on ``nodes * gpus_per_node`` GPUs.

    Args:
        config: the configuration to plan.
        nodes: number of nodes that train.
        gpus_per_node: number of GPUs per node.
        hardware: rates and memory of a GPU; an H100 by default.
        response_share: mean length of prompts and responses, as a share of the greatest.
        servers: where SGLang servers run; by default where the configuration says.
        on_gpu: whether the processes that the plan calls GPUs compute on GPUs; decides what ``auto`` means.

    Raises:
        UserError: if training would refuse the configuration: the layout does not divide the model, the job or the
            batch, the engine cannot generate, or sequences exceed the model's context.
    """
    servers = servers or Servers.of_job(config, None)
    config = resolve(servers.configure(config), on_gpu=on_gpu)
    hardware = hardware or Hardware()
    world_size = nodes * gpus_per_node
    check_engine(config)
    _check_servers(servers, config, gpus_per_node)
    shape, dtype, stages = model_stages(config.model, config.parallel, world_size, config.lora)
    parallel, rollout = config.parallel, config.rollout
    if rollout.routing_replay:
        check_routers(read_config(Path(config.model.path)), config.model.path)
    data_parallel = world_size // (parallel.tensor * parallel.pipeline * parallel.context)
    check_groups(rollout.prompts_per_step, config.algorithm.minibatches, data_parallel)
    check_context(config, shape.positions)
    memory = [
        StageMemory(
            replace(
                static_memory(stage, parallel, dtype, data_parallel, config.optimizer.cpu_offload),
                reference=reference_memory(stage, config, dtype.itemsize).held,
            ),
            phase_memory(shape, stage, config, dtype.itemsize, data_parallel, servers, hardware.memory_bytes),
        )
        for stage in stages
    ]
    cache = _server_cache(config, shape, dtype.itemsize, memory, servers, hardware)
    job = Job(
        config, shape, stages, dtype.itemsize, data_parallel, gpus_per_node, servers, cache, hardware, response_share
    )
    optimistic = replace(job, hardware=replace(hardware, compute_share=ASSUMED_UTILISATION))
    return Plan(
        config=config,
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        servers=servers,
        data_parallel=data_parallel,
        itemsize=dtype.itemsize,
        shape=shape,
        stages=stages,
        memory=memory,
        time=step_time(job),
        optimistic_time=step_time(optimistic),
        load=server_load(job) if rollout.engine == "sglang" else None,
        hardware=hardware,
    )


def _check_servers(servers: Servers, config: Config, gpus_per_node: int) -> None:
    """Refuse a number of server nodes that is no whole number of servers."""
    gpus = ServerLayout.from_arguments(config.rollout.sglang.server).gpus_per_replica
    if servers.placement == "nodes" and servers.nodes * gpus_per_node % gpus:
        raise UserError(
            f"a server of {gpus} GPUs does not divide the {servers.nodes * gpus_per_node} GPUs of {servers.nodes} "
            "nodes: choose another number of nodes for servers, or change rollout.sglang.server"
        )


def _server_cache(
    config: Config,
    shape: ModelShape,
    itemsize: int,
    memory: list[StageMemory],
    servers: Servers,
    hardware: Hardware,
) -> float:
    """Tokens in the cache of one replica: what ``mem_fraction_static`` leaves for it, or else all that is left."""
    if config.rollout.engine != "sglang" or servers.placement == "urls":
        return math.inf
    fraction = memory_fraction(config)
    if fraction is not None:
        static_bytes = fraction * hardware.memory_bytes
    elif servers.placement == "nodes":
        static_bytes = hardware.memory_bytes - SERVER_RUNTIME_BYTES
    else:
        static_bytes = server_room(memory, hardware.memory_bytes, config.rollout.sglang.release_memory)
    return cached_tokens(shape, config, itemsize, static_bytes)
