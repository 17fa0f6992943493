"""Commands to all servers: pause and continue generation, release and resume memory."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from megatron_rlvr.rollout.engines.sglang.config import SGLangConfig
from megatron_rlvr.rollout.engines.sglang.endpoint import Endpoint, ServerLostError


class ServerControl:
    """Sends a command to every server and waits until all have executed it.

    A server that does not answer is skipped: when it is back, clients restore its state before they send it prompts.
    All methods that send a command raise UserError if a server refuses it.

    Args:
        urls: URLs of the servers.
        config: timeouts, and what a pause does to running requests.
    """

    def __init__(self, urls: Sequence[str], config: SGLangConfig):
        self.urls, self.config = urls, config

    def endpoints(self) -> list[Endpoint]:
        """Return new endpoints for the running event loop, because connections belong to one loop."""
        return [Endpoint(url, self.config) for url in self.urls]

    async def pause_generation(self) -> None:
        """Pause generation; ``rollout.sglang.interrupt`` decides what happens to running requests."""
        await self._command_all("/pause_generation", {"mode": self.config.interrupt}, "pause generation")

    async def continue_generation(self) -> None:
        """Continue generation after `pause_generation`."""
        await self._command_all("/continue_generation", {}, "continue generation")

    async def release_memory(self) -> None:
        """Release the servers' memory for weights, caches and CUDA graphs."""
        await self._command_all("/release_memory_occupation", {}, "release its memory")

    async def resume_memory(self, *tags: str) -> None:
        """Allocate memory again; `tags` are ``weights``, ``kv_cache`` and ``cuda_graph``."""
        await self._command_all("/resume_memory_occupation", {"tags": list(tags)}, "resume its memory")

    async def _command_all(self, path: str, body: dict[str, Any], action: str) -> None:
        async def command(endpoint: Endpoint) -> None:
            with suppress(ServerLostError):
                await endpoint.command(path, body, action)

        await asyncio.gather(*[command(endpoint) for endpoint in self.endpoints()])
