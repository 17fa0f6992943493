"""Where the nodes of the preflight meet, and how one says that another must not train."""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Sequence
from typing import Any


class BadNodesError(Exception):
    """Nodes that must not train: their names, and why."""

    def __init__(self, nodes: Sequence[str], reason: str):
        super().__init__(reason)
        self.nodes = list(nodes)


class Meeting:
    """Where the nodes of the preflight meet: a store at the head, messages by name, no wait beyond the deadline."""

    def __init__(self, nodes: Sequence[str], index: int, endpoint: tuple[str, int], seconds: float):
        import torch.distributed as dist

        self.nodes, self.index, self.endpoint = nodes, index, endpoint
        self.deadline = time.monotonic() + seconds
        self.store = dist.TCPStore(
            *endpoint, is_master=index == 0, wait_for_workers=False, timeout=datetime.timedelta(seconds=seconds)
        )

    def left(self) -> float:
        return max(0.1, self.deadline - time.monotonic())

    def say(self, name: str, value: Any) -> None:
        """Leave a message of this node."""
        self.store.set(f"{name}/{self.index}", json.dumps(value))

    def hear(self, name: str, index: int, seconds: float) -> Any:
        """A node's message, or None when it has not come in time."""
        import torch.distributed as dist

        key = f"{name}/{index}"
        try:
            self.store.wait([key], datetime.timedelta(seconds=max(0.1, seconds)))
        except dist.DistStoreError:
            return None
        return json.loads(self.store.get(key))
