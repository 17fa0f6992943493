"""The SGLang servers of one node: ``python -m megatron_rlvr.cluster.serve --folder DIR CONFIG [key=value ...]``.

Starts ``rollout.sglang.servers`` servers, each on its own GPUs, and restarts those that die or hang. It stops them when
it receives a stop signal, when ``DIR/wanted`` holds the word ``stop``, or when it dies. Once all servers answer, it
writes their URLs to ``DIR/NODE.urls``, comma-separated, and what the trainer must know to share memory with them to
``DIR/NODE.json``. Their output goes to ``DIR/NODE/server_N.log``. The environment variable RLVR_SGLANG_KEY holds the
key that they demand.
"""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from megatron_rlvr.atomic_write import write_text
from megatron_rlvr.bound_to_parent import exit_with_parent
from megatron_rlvr.config import Config, load_config, resolve
from megatron_rlvr.errors import UserError
from megatron_rlvr.exit_status import EXIT_DONE, EXIT_USER_ERROR
from megatron_rlvr.megatron import device
from megatron_rlvr.node import node_name
from megatron_rlvr.node_address import node_address
from megatron_rlvr.rollout.engines.sglang.fp8_servers import start_folder
from megatron_rlvr.rollout.engines.sglang.kept_sets import with_kept_sets
from megatron_rlvr.rollout.engines.sglang.registry import ServerPlace, register
from megatron_rlvr.rollout.engines.sglang.routed_experts import with_routed_experts
from megatron_rlvr.rollout.engines.sglang.server_key import KEY_VARIABLE, key_from_environment
from megatron_rlvr.rollout.engines.sglang.server_pool import ServerPool
from megatron_rlvr.rollout.engines.sglang.weight_sync.copy_service import copy_service
from megatron_rlvr.rollout.engines.sglang.weight_sync.placement import gpu_uuids, nccl_version

_WATCH_PERIOD_S = 0.5


def node_pool(config: Config, logs: Path, key: str) -> ServerPool:
    """Return the servers of this node, not started yet. Other nodes can reach them, and each has its own GPUs."""
    folder = start_folder(config.rollout.sglang, Path(config.model.path))
    sglang = replace(
        with_routed_experts(config.rollout, with_kept_sets(config.rollout, folder)),
        server={"host": node_address(node_name()), **config.rollout.sglang.server},
        # This process does not know when the trainer has a server load weights, and a server may be silent as long as
        # an update takes. The trainer's clients notice a server that hangs earlier, and send its prompts to another.
        health_timeout_seconds=max(
            config.rollout.sglang.health_timeout_seconds, config.rollout.sglang.update_timeout_seconds
        ),
    )
    return ServerPool(
        sglang,
        folder,
        config.model.dtype,
        logs,
        # A machine's host name can differ from the name by which other nodes reach it.
        host_name=node_name(),
        # CUDA IPC names a GPU by its UUID, so a server need not see the GPUs of others to share memory with a trainer.
        hide_other_gpus=True,
        key=key,
    )


def still_wanted(folder: Path) -> bool:
    """Whether the batch script has not written ``stop`` to the file ``wanted``.

    It is always the same file, because network file systems notice new contents at once but may overlook a new file.
    """
    try:
        return (folder / "wanted").read_text().strip() != "stop"
    except OSError:
        return True


def _places(pool: ServerPool, copies: str | None) -> list[ServerPlace]:
    """Return where the servers of this node run, and the URL of its service for copies of the weights."""
    gpus = [gpu_uuids(server.gpus) for server in pool.servers]
    nccl = nccl_version(pool.config.python or sys.executable) if any(gpus) else None
    places = zip(pool.servers, gpus, strict=True)
    return [ServerPlace(server.url, node_name(), of_server, nccl, copies) for server, of_server in places]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("config", help="YAML file of training")
    parser.add_argument("overrides", nargs="*", help="key=value, as for training")
    options = parser.parse_args(arguments)
    node = node_name()
    stop = threading.Event()
    # The server processes die with this thread, so it must end by itself to stop them in order.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    # Slurm's signal before the time limit is meant for the ranks, whose last step still needs the servers.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    exit_with_parent()
    try:
        config = resolve(load_config(options.config, options.overrides), on_gpu=device.on_gpu())
        key = key_from_environment()
        if key is None:
            raise UserError(f"no {KEY_VARIABLE} for the servers: set it to a random text here and for the trainer")
        pool = node_pool(config, options.folder / node, key)
        with pool, ExitStack() as stack:
            copies = None
            if config.rollout.sglang.weight_sync == "delta":
                copies = stack.enter_context(copy_service(node_address(node), key))
            register(options.folder, _places(pool, copies))
            write_text(options.folder / f"{node}.urls", ",".join(pool.urls) + "\n")
            while not stop.wait(_WATCH_PERIOD_S) and still_wanted(options.folder):
                if pool.failure:
                    raise UserError(pool.failure)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
