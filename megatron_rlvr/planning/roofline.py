"""Seconds of a step from a roofline: what compute, memory and network allow at stated rates. Computed, not measured."""

from __future__ import annotations

from dataclasses import dataclass, fields

from megatron_rlvr.planning.exchanges import (
    context_exchange_time,
    expert_exchange_time,
    gradient_exchange_time,
    optimizer_time,
    tensor_exchange_time,
    weight_sync_time,
)
from megatron_rlvr.planning.generation import local_generation_time, server_generation_time
from megatron_rlvr.planning.job import Job
from megatron_rlvr.planning.reference import reference_time

_NOT_PHASES = ("response_tokens", "overlapped")


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step by phase, for responses of `response_tokens` each."""

    response_tokens: float
    generate: float
    score: float
    reference: float
    update: float
    tensor_parallel: float
    expert_parallel: float
    context_parallel: float
    data_parallel: float
    optimizer: float
    weight_sync: float
    overlapped: bool = False
    """Whether servers generate the next rollout while the policy trains on this one (`rollout.max_staleness`)."""

    @property
    def seconds_by_phase(self) -> dict[str, float]:
        """The phases, which add up to the step unless generation is overlapped."""
        return {name.name: getattr(self, name.name) for name in fields(self) if name.name not in _NOT_PHASES}

    @property
    def hidden(self) -> float:
        """Seconds that generation and training overlap; weights are sent in between."""
        training = sum(self.seconds_by_phase.values()) - self.generate - self.weight_sync
        return min(self.generate, training) if self.overlapped else 0.0

    @property
    def total(self) -> float:
        return sum(self.seconds_by_phase.values()) - self.hidden

    @property
    def dominant(self) -> str:
        """The longest phase."""
        phases = self.seconds_by_phase
        return max(phases, key=lambda name: phases[name])


def step_time(job: Job) -> StepTime:
    """Time of a step in which every group has a gradient.

    Scoring is one forward pass, and that of a reference another one. The update is three, or four with full
    recomputation, ``epochs`` times; one less with adapters, because frozen weights have no gradient. All are stretched
    by the pipeline's bubble.
    """
    algorithm = job.config.algorithm
    compute = job.forward_flops * job.bubble / job.hardware.reached_flops
    served = job.config.rollout.engine == "sglang"
    return StepTime(
        response_tokens=job.response_tokens,
        generate=server_generation_time(job) if served else local_generation_time(job),
        score=compute,
        reference=reference_time(job, compute),
        update=(1 + job.backward_and_recomputation) * compute * algorithm.epochs,
        tensor_parallel=tensor_exchange_time(job) * job.bubble,
        expert_parallel=expert_exchange_time(job) * job.bubble,
        context_parallel=context_exchange_time(job) * job.bubble,
        data_parallel=gradient_exchange_time(job),
        optimizer=optimizer_time(job),
        weight_sync=weight_sync_time(job),
        # On the same GPUs, generation and training would only share them.
        overlapped=job.config.rollout.max_staleness > 0 and job.servers.placement in ("nodes", "urls"),
    )
