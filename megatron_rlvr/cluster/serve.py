"""The SGLang servers of one node: ``python -m megatron_rlvr.cluster.serve --folder DIR CONFIG [key=value ...]``.

Starts ``rollout.sglang.servers`` servers, each on its own GPUs, restarts those that die or hang, and stops them when it
receives a stop signal or dies. ``DIR/NODE.urls`` holds their addresses, comma-separated, once all of them
answer; ``DIR/NODE/server_N.log`` their output.
"""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megatron_rlvr.atomic_write import write_text
from megatron_rlvr.bound_to_parent import exit_with_parent
from megatron_rlvr.cluster import node_name
from megatron_rlvr.config import Config, load_config, resolve
from megatron_rlvr.errors import UserError
from megatron_rlvr.exit_status import EXIT_DONE, EXIT_USER_ERROR
from megatron_rlvr.megatron import device
from megatron_rlvr.rollout.engines.sglang.launch_arguments import ServerLayout
from megatron_rlvr.rollout.engines.sglang.server_pool import ServerPool, visible_gpus

_WATCH_PERIOD_S = 0.5


def node_pool(config: Config, logs: Path) -> ServerPool:
    """The servers of this node, not started yet: reachable from other nodes, each with GPUs of its own."""
    sglang = replace(
        config.rollout.sglang,
        server={"host": "0.0.0.0", **config.rollout.sglang.server},
        # Here nobody knows when the trainer has a server load weights, which takes as long as an update may: one that
        # is silent for less must not be taken for hung. The trainer's clients see a hang earlier, and ask another one.
        health_timeout_seconds=max(
            config.rollout.sglang.health_timeout_seconds, config.rollout.sglang.update_timeout_seconds
        ),
    )
    pool = ServerPool(sglang, Path(config.model.path).resolve(), config.model.dtype, logs)
    each, visible = ServerLayout.from_arguments(sglang.server).gpus, visible_gpus(sglang)
    if device.on_gpu() and len(visible) < each * len(pool.servers):
        raise UserError(
            f"{len(pool.servers)} servers (rollout.sglang.servers) of {each} GPUs each need more than the "
            f"{len(visible)} GPUs of this node"
        )
    for number, server in enumerate(pool.servers):
        if server.host == "0.0.0.0":
            # What the nodes call each other, which need not be what a machine calls itself.
            server.url = f"http://{node_name()}:{server.port}"
        if device.on_gpu():  # no memory is shared with a trainer here, so each may see its own GPUs only
            server.environment["CUDA_VISIBLE_DEVICES"] = ",".join(visible[number * each : (number + 1) * each])
            server.arguments["base_gpu_id"] = 0
    return pool


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("config", help="YAML file of training")
    parser.add_argument("overrides", nargs="*", help="key=value, as for training")
    options = parser.parse_args(arguments)
    node = node_name()
    stop = threading.Event()
    # The servers' processes are bound to this thread; it must end by itself, so that they are stopped in order.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    # Slurm's signal before the time limit is for the ranks, whose last step still needs the servers.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    exit_with_parent()
    try:
        config = resolve(load_config(options.config, options.overrides), on_gpu=device.on_gpu())
        pool = node_pool(config, options.folder / node)
        with pool:
            write_text(options.folder / f"{node}.urls", ",".join(pool.urls) + "\n")
            while not stop.wait(_WATCH_PERIOD_S):
                if pool.failure:
                    raise UserError(pool.failure)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
