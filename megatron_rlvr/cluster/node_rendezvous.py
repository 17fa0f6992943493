"""A store on the first node of a job, through which the processes of the preflight exchange messages."""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Sequence
from typing import Any

from megatron_rlvr.node_address import listening_store, node_address

_SHORTEST_WAIT_S = 0.1


class PortTakenError(Exception):
    """The port of the store is taken, perhaps by a process of an earlier job. Another attempt uses another port."""


class NodeRendezvous:
    """Messages between the nodes of a job. The first node, the head, hosts the store.

    Args:
        nodes: names of all nodes, the head first.
        index: index of this node in `nodes`.
        endpoint: host and port of the store.
        seconds: time from now to the deadline of the whole exchange.

    Raises:
        PortTakenError: on the first node, if the port is taken.
    """

    def __init__(self, nodes: Sequence[str], index: int, endpoint: tuple[str, int], seconds: float):
        import torch.distributed as dist

        self.nodes, self.index, self.endpoint = nodes, index, endpoint
        self.deadline = time.monotonic() + seconds
        timeout = datetime.timedelta(seconds=seconds)
        if index == 0:
            address = node_address(endpoint[0])
            try:
                self.store = listening_store(address, endpoint[1], timeout)
                self.endpoint = (address, endpoint[1])  # this node's own name may lead elsewhere
            except OSError as error:
                raise PortTakenError(f"port {endpoint[1]} of {address} cannot be used ({error.strerror})") from error
        else:
            self.store = dist.TCPStore(*endpoint, is_master=False, wait_for_workers=False, timeout=timeout)

    def seconds_left(self) -> float:
        """Return the seconds until the deadline, always a little more than 0."""
        return max(_SHORTEST_WAIT_S, self.deadline - time.monotonic())

    def publish(self, name: str, value: Any) -> None:
        """Store a message of this node. `value` must be JSON serializable."""
        self.store.set(f"{name}/{self.index}", json.dumps(value))

    def read(self, name: str, index: int, seconds: float) -> Any:
        """Return the message of a node, or None if it does not arrive within `seconds`."""
        import torch.distributed as dist

        key = f"{name}/{index}"
        try:
            self.store.wait([key], datetime.timedelta(seconds=max(_SHORTEST_WAIT_S, seconds)))
        except dist.DistStoreError:
            return None
        return json.loads(self.store.get(key))
