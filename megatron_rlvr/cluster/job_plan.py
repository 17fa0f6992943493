"""The plan of a job: what its configuration needs on the GPUs that its nodes have."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace

from megatron_rlvr.cluster.node_checks import NodeReport
from megatron_rlvr.config import Config
from megatron_rlvr.errors import UserError
from megatron_rlvr.rollout.engines.sglang.launch_arguments import normalized


def plan(config: Config, reports: Sequence[NodeReport], nodes: int, processes: int, servers: str = "none") -> str:
    """What the configuration needs, computed.

    Args:
        servers: that the job will start: none, colocated or nodes:N.

    Raises:
        UserError: when the layout does not divide the job, does not fit the GPUs that are there, or cannot generate.
    """
    # Imported here, in the child that plans: megatron-core looks at the GPU as it is imported.
    from megatron_rlvr.planning.plan import make_plan
    from megatron_rlvr.planning.report import describe, verdict
    from megatron_rlvr.planning.roofline import Hardware

    rollout = config.rollout
    memory = [mebibytes for report in reports[:nodes] for _, mebibytes in report.gpus]
    hardware = replace(Hardware(), memory_bytes=min(memory) * 2.0**20) if memory else Hardware()
    beside = ""
    if servers != "none":  # on GPUs of their own, or with a share of these that is theirs all the time
        config = replace(
            config, rollout=replace(rollout, engine="sglang", sglang=replace(rollout.sglang, urls=["http://not.yet"]))
        )
    elif memory and rollout.engine == "local" and config.model.layer_spec != "local":
        raise UserError(
            "rollout.engine=local needs model.layer_spec=local: set RLVR_SERVERS=colocated or nodes:N, and the job "
            "generates on SGLang servers"
        )
    if memory and servers == "colocated":
        share = normalized(rollout.sglang.server).get("mem_fraction_static")
        if share is None:
            raise UserError(
                "servers beside training (RLVR_SERVERS=colocated) need rollout.sglang.server.mem_fraction_static: the "
                "share of each GPU that they keep"
            )
        hardware = replace(hardware, memory_bytes=hardware.memory_bytes * (1 - float(share)))
        beside = f" beside servers that keep {float(share):.0%} of each GPU"
    made = make_plan(config, nodes, processes, hardware)
    if not memory:
        return f"layout: {made.data_parallel} data-parallel ranks on {nodes} x {processes} processes, no GPUs"
    if not made.fits and not os.environ.get("RLVR_IGNORE_PLAN"):
        raise UserError(
            f"by the plan (computed) the configuration {verdict(made)}{beside}; RLVR_IGNORE_PLAN=1 trains all the same"
        )
    return describe(made)
