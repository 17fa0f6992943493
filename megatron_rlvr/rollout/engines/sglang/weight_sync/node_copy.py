"""The `LocalCopy` of another node, as the main process brings it up to date: the client of `copy_service`."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any
from urllib.parse import quote

from megatron_rlvr.checksums import LIST, digest, file_names
from megatron_rlvr.errors import UserError
from megatron_rlvr.rollout.engines.sglang.endpoint import Endpoint, ServerLostError
from megatron_rlvr.rollout.engines.sglang.weight_sync.copy_service import FILES, OFFER, UPDATE

_STREAMS = 4
"""Files that travel to one node at the same time."""


class NodeCopy:
    """Hands folders of weights to the service of another node. Belongs to one event loop.

    Args:
        service: the node's service.
        root: where the node keeps its copy.

    Attributes:
        sent: bytes that travelled over HTTP.
        sees_run: whether the node sees the run directory; None before the first folder.
    """

    def __init__(self, service: Endpoint, root: Path):
        self.service, self.root = service, root
        self.sent = 0
        self.sees_run: bool | None = None

    async def take(self, folder: Path, action: str, **full: Any) -> None:
        """Let the node take a delta, or full weights, which it reads itself or receives over HTTP.

        Args:
            folder: folder with checksums.
            action: what the node is asked to do; completes "the server did not ...".
            full: ``version`` and ``chain`` of full weights.

        Raises:
            UserError: if the node refuses the weights, because they are damaged or it cannot use or write them.
            ServerLostError: if it does not answer, or not all files arrive within ``update_timeout_seconds``.
        """
        try:
            checksum = digest(folder / LIST)
        except OSError as error:
            raise UserError(f"{folder} cannot be read: {error}") from error
        body = {"root": str(self.root), "folder": str(folder), "checksum": checksum}
        self.sees_run = (await self.service.command(OFFER, body, action)).get("seen") is True
        if not self.sees_run:
            seconds = self.service.config.update_timeout_seconds
            try:
                async with asyncio.timeout(seconds):
                    await self._send(folder, checksum, action)
            except TimeoutError as error:
                raise ServerLostError(f"{folder} did not arrive within {seconds:g} s") from error
        await self.service.command(UPDATE, {**body, **full}, action)

    async def _send(self, folder: Path, checksum: str, action: str) -> None:
        free = asyncio.Semaphore(_STREAMS)

        async def send(name: str) -> None:
            async with free:
                await self.service.command(f"{FILES}/{checksum}/{quote(name)}", folder / name, action)
                self.sent += (folder / name).stat().st_size

        try:
            async with asyncio.TaskGroup() as files:
                for name in (*file_names(folder), LIST):
                    files.create_task(send(name))
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
