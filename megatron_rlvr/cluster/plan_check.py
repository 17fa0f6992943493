"""Whether a configuration can run on the GPUs of a job's nodes, by the plan of `megatron_rlvr.planning`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace

from megatron_rlvr.cluster.node_checks import NodeReport
from megatron_rlvr.config import Config
from megatron_rlvr.errors import UserError


def check_plan(config: Config, reports: Sequence[NodeReport], nodes: int, processes: int, servers: str = "none") -> str:
    """Return the plan of a configuration as text. It is computed, not measured.

    Args:
        reports: reports of all nodes, the training nodes first.
        nodes: number of training nodes.
        processes: training processes per node.
        servers: SGLang servers that the job will start: none, colocated or nodes:N.

    Raises:
        UserError: if the layout does not divide the job or does not fit its GPUs, or if the job has no engine that can
            generate. The environment variable RLVR_IGNORE_PLAN turns off the check of memory.
    """
    # Imported here, in the process that plans, because megatron-core looks at the GPU when it is imported.
    from megatron_rlvr.planning.job import Hardware
    from megatron_rlvr.planning.plan import make_plan
    from megatron_rlvr.planning.report import describe, verdict
    from megatron_rlvr.planning.servers import Servers

    memory = [mebibytes for report in reports[:nodes] for _, mebibytes in report.gpus]
    hardware = replace(Hardware(), memory_bytes=min(memory) * 2.0**20) if memory else Hardware()
    placement = Servers.of_job(config, servers)
    if memory:
        hosts = reports[nodes:] if placement.placement == "nodes" else reports[:nodes]
        check_servers(config, servers, min(len(report.gpus) for report in hosts or reports))
    plan = make_plan(config, nodes, processes, hardware, servers=placement, on_gpu=bool(memory))
    if not memory:
        return f"layout: {plan.data_parallel} data-parallel ranks on {nodes} x {processes} processes, no GPUs"
    if not plan.fits and not os.environ.get("RLVR_IGNORE_PLAN"):
        raise UserError(
            f"by the plan (computed) the configuration {verdict(plan)}; set RLVR_IGNORE_PLAN=1 to train anyway"
        )
    return describe(plan)


def check_servers(config: Config, servers: str, gpus: int) -> None:
    """Refuse servers of a GPU job that a node has too few GPUs for, or without a share of the GPUs' memory.

    Args:
        servers: SGLang servers that the job will start: none, colocated or nodes:N.
        gpus: GPUs of each node that they run on.
    """
    from megatron_rlvr.planning.servers import memory_fraction
    from megatron_rlvr.rollout.engines.sglang.launch_arguments import check_gpus

    if servers == "none":
        return
    sglang = config.rollout.sglang
    check_gpus(sglang.server, sglang.servers, gpus, "a node")
    if memory_fraction(config) is None:
        raise UserError(
            f"RLVR_SERVERS={servers} needs rollout.sglang.server.mem_fraction_static: set it to the share of each "
            "GPU's memory that the servers keep; tools/plan.py prints the largest that fits"
        )
