"""What the SGLang servers of a job tell the trainer: a file per node that says where each of them runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_rlvr.atomic_write import write_text
from megatron_rlvr.checked_input import read_json
from megatron_rlvr.errors import UserError
from megatron_rlvr.node import node_name


@dataclass(frozen=True)
class ServerPlace:
    """Where a server runs.

    Attributes:
        url: URL of the server.
        node: name of its node.
        gpus: UUIDs of its GPUs, by rank of the server; empty on the CPU.
        nccl: version of NCCL in its environment; None on the CPU, or if unknown.
        copies: URL of its node's service for ``weight_sync: delta``; None without one.
    """

    url: str
    node: str
    gpus: tuple[str, ...] = ()
    nccl: str | None = None
    copies: str | None = None


def register(folder: Path, places: Sequence[ServerPlace]) -> None:
    """Write the servers of this node to a file of `folder`, for `read_registry`."""
    servers = [asdict(place) for place in places]
    write_text(folder / f"{node_name()}.json", json.dumps({"servers": servers}))


def read_registry(folder: Path) -> list[ServerPlace]:
    """Read the servers of all nodes that `register` wrote to a folder.

    Raises:
        UserError: if there are none, or a file is damaged.
    """
    remedy = "start the servers again with megatron_rlvr.cluster.serve"
    places = []
    for path in sorted(folder.glob("*.json")):
        try:
            for entry in read_json(path, remedy=remedy)["servers"]:
                gpus = tuple(str(gpu) for gpu in entry["gpus"])
                url, node = str(entry["url"]), str(entry["node"])
                places.append(ServerPlace(url, node, gpus, entry["nccl"], entry.get("copies")))
        except (KeyError, TypeError) as error:
            raise UserError(f"{path} does not describe SGLang servers ({error!r}): {remedy}") from None
    if not places:
        raise UserError(f"rollout.sglang.registry={folder} describes no SGLang server: {remedy}")
    return places
