"""The interface of a transport: how buckets of weights reach running servers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from megatron_rlvr.rollout.engines.sglang.endpoint import Endpoint
from megatron_rlvr.weights.buckets import Bucket


@dataclass(frozen=True)
class Receiver:
    """A server that receives weights.

    Attributes:
        endpoint: of the server.
        ranks: tensor-parallel ranks that its model is spread over.
        starts: how many times the trainer has started it; a restarted server has forgotten its process groups.
    """

    endpoint: Endpoint
    ranks: int
    starts: int


class Transport(Protocol):
    """Sends buckets to servers that have begun a weight update."""

    def allocate(self, size: int) -> Tensor:
        """Allocate the buffer of a bucket: uint8, [size]."""
        ...

    async def connect(self, receivers: Sequence[Receiver]) -> None:
        """Prepare to send to these servers.

        Raises:
            ServerLostError: if one of them cannot be prepared.
        """
        ...

    async def send(self, bucket: Bucket, fields: dict[str, Any]) -> None:
        """Send a bucket to all servers.

        Args:
            bucket: whose memory may be reused afterwards.
            fields: added to the body of each request.

        Raises:
            ServerLostError: if a server does not take the bucket. None of them can be relied on then.
        """
        ...

    def abandon(self) -> None:
        """Release the servers that may wait for more, after a failure."""
        ...

    def close(self) -> None:
        """Clean up at the end of the run."""
        ...
