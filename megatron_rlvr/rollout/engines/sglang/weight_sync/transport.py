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
        endpoint: the server.
        ranks: number of its tensor-parallel ranks.
        starts: how many times the trainer has started it. A restarted server has lost its process groups.
    """

    endpoint: Endpoint
    ranks: int
    starts: int


class Transport(Protocol):
    """Sends buckets to servers that have begun a weight update."""

    holds_buckets: bool
    """Whether this process must have the buckets in memory."""

    def allocate(self, size: int) -> Tensor:
        """Allocate the buffer of a bucket: uint8 [size]."""
        ...

    def share(self, bucket: Bucket) -> None:
        """Prepare to send a filled bucket. Every process that holds it calls this, also if it sends nothing itself."""
        ...

    async def connect(self, receivers: Sequence[Receiver]) -> None:
        """Prepare to send to these servers.

        Raises:
            ServerLostError: if one of them cannot be prepared.
        """
        ...

    async def send(self, bucket: Bucket, fields: dict[str, Any]) -> None:
        """Send a bucket to all servers. Its memory may be reused afterwards.

        Args:
            bucket: tensors to send.
            fields: extra fields of the body of each request.

        Raises:
            ServerLostError: if a server does not load the bucket. The weights of all servers are undefined then.
        """
        ...

    def abandon(self) -> None:
        """After a failure, release servers that may wait for more buckets."""
        ...

    def close(self) -> None:
        """Release resources at the end of the run."""
        ...
