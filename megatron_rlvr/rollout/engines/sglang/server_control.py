"""Commands to all servers at once: pause and continue generation, release and resume memory."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from megatron_rlvr.rollout.engines.sglang.config import SGLangConfig
from megatron_rlvr.rollout.engines.sglang.endpoint import Endpoint, ServerLostError


class ServerControl:
    """Sends a command to every server and waits until all have carried it out.

    A server that does not answer is skipped: clients bring it up to date when it is back, before they send it prompts.
    A server that refuses a command raises UserError.

    Args:
        urls: of the servers.
        config: timeouts.
    """

    def __init__(self, urls: Sequence[str], config: SGLangConfig):
        self.urls, self.config = urls, config

    def endpoints(self) -> list[Endpoint]:
        """New endpoints for the running event loop, because connections belong to one loop."""
        return [Endpoint(url, self.config) for url in self.urls]

    async def pause_generation(self, mode: str) -> None:
        """Pause generation; `mode` says what becomes of running requests, see ``rollout.sglang.interrupt``."""
        await self._command_all("/pause_generation", {"mode": mode}, "pause generation")

    async def continue_generation(self) -> None:
        await self._command_all("/continue_generation", {}, "continue generation")

    async def release_memory(self) -> None:
        """Have servers release the memory of weights, caches and CUDA graphs."""
        await self._command_all("/release_memory_occupation", {}, "release its memory")

    async def resume_memory(self, *tags: str) -> None:
        """Have servers allocate memory again: ``weights``, ``kv_cache``, ``cuda_graph``."""
        await self._command_all("/resume_memory_occupation", {"tags": list(tags)}, "resume its memory")

    async def _command_all(self, path: str, body: dict[str, Any], action: str) -> None:
        async def command(endpoint: Endpoint) -> None:
            with suppress(ServerLostError):
                await endpoint.command(path, body, action)

        await asyncio.gather(*[command(endpoint) for endpoint in self.endpoints()])
