"""What the reference policy of a KL penalty adds to the memory and to the time of a step, computed."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_rlvr.config import Config
from megatron_rlvr.megatron.stage_shapes import Stage
from megatron_rlvr.planning.job import Job


@dataclass(frozen=True)
class ReferenceMemory:
    """Bytes of a rank for the weights of the reference.

    Attributes:
        held: on its GPU, all the time.
        scoring: on its GPU while a rollout is scored, in addition to `held`.
        host: in page-locked host memory, all the time.
    """

    held: int = 0
    scoring: int = 0
    host: int = 0


def reference_memory(stage: Stage, config: Config, itemsize: int) -> ReferenceMemory:
    """Return the bytes of a rank of a pipeline stage.

    torch rounds every page-locked tensor up to a power of two. Adapters need no weights of their own, because their
    reference is the frozen weights; with another one they do.

    Args:
        stage: pipeline stage of the rank.
        config: the resolved configuration.
        itemsize: bytes per element of weights.
    """
    frozen = config.lora.rank and config.reference.path is None and config.checkpoint.start_from is None
    if not config.algorithm.kl_coefficient or frozen:
        return ReferenceMemory()
    weights = stage.count * itemsize
    if config.reference.weights == "device":
        return ReferenceMemory(held=weights)
    if config.reference.weights == "disk":
        return ReferenceMemory(scoring=weights)
    tensors = (count * itemsize for count in (*stage.parameters, *stage.experts))
    return ReferenceMemory(scoring=weights, host=sum(1 << (size - 1).bit_length() for size in tensors))


def reference_time(job: Job, forward_pass: float) -> float:
    """Return the seconds that the reference adds to a step: one forward pass, and the way of its weights to the GPU.

    Every rank copies its weights from host memory, at the same time. From the disk, the ranks of a replica read the
    whole model once at the rate of one reader.

    Args:
        job: the job.
        forward_pass: seconds of the scoring pass.
    """
    if not job.config.algorithm.kl_coefficient:
        return 0.0
    scoring = max(reference_memory(stage, job.config, job.itemsize).scoring for stage in job.stages)
    if job.config.reference.weights == "disk" and scoring:
        return forward_pass + job.shape.parameters * job.itemsize / job.hardware.disk_rate
    return forward_pass + scoring / job.hardware.reached_host_rate
