"""Commands to all servers: pause and continue generation, release and resume memory."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any

from megatron_rlvr.errors import UserError
from megatron_rlvr.rollout.engines.sglang.config import SGLangConfig
from megatron_rlvr.rollout.engines.sglang.endpoint import Endpoint, ServerLostError

_FLUSH_PERIOD_S = 0.1


class ServerControl:
    """Sends a command to every server and waits until all have executed it.

    A server that does not answer is skipped: when it is back, clients restore its state before they send it prompts.
    All methods that send a command raise UserError if a server refuses it.

    Args:
        urls: URLs of the servers.
        config: timeouts, and what a pause does to running requests.
        key: the key that the servers demand.
    """

    def __init__(self, urls: Sequence[str], config: SGLangConfig, key: str | None = None):
        self.urls, self.config, self.key = urls, config, key

    def endpoints(self) -> list[Endpoint]:
        """Return new endpoints for the running event loop, because connections belong to one loop."""
        return [Endpoint(url, self.config, key=self.key) for url in self.urls]

    async def pause_generation(self) -> None:
        """Pause generation; ``rollout.sglang.interrupt`` decides what happens to running requests."""
        await self._command_all("/pause_generation", {"mode": self.config.interrupt}, "pause generation")

    async def continue_generation(self) -> None:
        """Continue generation after `pause_generation`."""
        await self._command_all("/continue_generation", {}, "continue generation")

    async def release_memory(self) -> None:
        """Abort what the servers still generate, and release their memory for weights, caches and CUDA graphs.

        SGLang's scheduler dies if it is asked to release memory that a request uses. Requests of cancelled groups may
        still run, because a server notices a closed connection late. So each server is paused, which aborts all
        requests, until `continue_generation`, and releases its memory once it flushed its cache, which it refuses while
        it is busy.

        Raises:
            UserError: if a server is still busy after ``update_timeout_seconds``.
        """

        async def release(endpoint: Endpoint) -> None:
            await endpoint.command("/pause_generation", {"mode": "abort"}, "abort its requests")
            deadline = time.monotonic() + self.config.update_timeout_seconds
            # One that answers slowly is not lost: the trainer on its GPU needs the memory.
            while (reply := await endpoint.patient_request("/flush_cache")).status != 200:
                if time.monotonic() > deadline:
                    raise UserError(
                        f"{endpoint.url} is still busy after rollout.sglang.update_timeout_seconds="
                        f"{self.config.update_timeout_seconds:g}, so it cannot release its memory (/flush_cache "
                        f"answered {reply.excerpt()}): check that no other run uses this server"
                    )
                await asyncio.sleep(_FLUSH_PERIOD_S)
            await endpoint.command("/release_memory_occupation", {}, "release its memory")

        await self._on_all(release)

    async def resume_memory(self, *tags: str) -> None:
        """Allocate memory again; `tags` are ``weights``, ``kv_cache`` and ``cuda_graph``."""
        await self._command_all("/resume_memory_occupation", {"tags": list(tags)}, "resume its memory")

    async def _command_all(self, path: str, body: dict[str, Any], action: str) -> None:
        await self._on_all(lambda endpoint: endpoint.command(path, body, action))

    async def _on_all(self, work: Callable[[Endpoint], Awaitable[object]]) -> None:
        async def attempt(endpoint: Endpoint) -> None:
            with suppress(ServerLostError):
                await work(endpoint)

        await asyncio.gather(*[attempt(endpoint) for endpoint in self.endpoints()])
