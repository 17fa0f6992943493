"""One SGLang server as its clients see it: whether it can be used, and the requests that it is sent."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from typing import Any

from megatron_rlvr.errors import UserError
from megatron_rlvr.rollout.engines.sglang.config import SGLangConfig
from megatron_rlvr.rollout.engines.sglang.http import ConnectionLostError, Connections, Reply, ReplyTimeoutError
from megatron_rlvr.rollout.engines.sglang.server_state import ServerState

_PROBE_PERIOD_S = 1.0


class ServerLostError(Exception):
    """A server died, hung, or holds the wrong weights. What it was asked must be asked elsewhere."""


@dataclass
class Endpoint:
    """A server and the requests that are open there. Belongs to one event loop.

    Attributes:
        url: of the server, without a trailing slash.
        config: timeouts.
        up: whether it is sent prompts.
        why_down: the reason while it is not `up`.
        was_lost: whether it was ever lost.
        prompts_in_flight: prompts that it works on for this client.
        open_requests: the requests of these prompts.
        probe_now: set to have it probed at once.
    """

    url: str
    config: SGLangConfig
    up: bool = False
    why_down: str = "it was not asked yet"
    was_lost: bool = False
    prompts_in_flight: int = 0
    open_requests: set[asyncio.Task[Reply]] = field(default_factory=set)
    probe_now: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.url = self.url.rstrip("/")
        self.connections = Connections(self.url)

    def mark_lost(self, why: str) -> ServerLostError:
        """Stop using the server and cancel its open requests; returns the exception to raise."""
        self.up, self.why_down, self.was_lost = False, why, True
        for task in self.open_requests:
            task.cancel()
        self.probe_now.set()
        return ServerLostError(f"{self.url}: {why}")

    async def generate(self, body: bytes) -> Reply:
        """Send a request to ``/generate``.

        Raises:
            ServerLostError: if there is no usable answer, or when the server is marked as lost in the meantime.
        """
        timeout = self.config.request_timeout_seconds
        request = asyncio.create_task(self.connections.request("POST", "/generate", timeout, body))
        self.open_requests.add(request)
        try:
            await asyncio.wait([request])
        finally:
            self.open_requests.discard(request)
            if not request.done():
                request.cancel()
        if request.cancelled():
            raise ServerLostError(f"{self.url}: {self.why_down}")
        try:
            reply = request.result()
        except ReplyTimeoutError as error:  # perhaps it is slow with this prompt alone, so its other requests go on
            raise ServerLostError(f"{self.url}: {error} (rollout.sglang.request_timeout_seconds)") from error
        except ConnectionLostError as error:
            raise self.mark_lost(str(error)) from error
        if reply.status >= 500:
            raise self.mark_lost(f"status {reply.status}")
        return reply

    async def request(self, method: str, path: str, timeout: float, body: Any = None) -> Reply:
        """Send any other request.

        Raises:
            ServerLostError: if there is no answer within `timeout` seconds.
        """
        try:
            data = b"" if body is None else json.dumps(body).encode()
            return await self.connections.request(method, path, timeout, data)
        except (ConnectionLostError, ReplyTimeoutError) as error:
            raise ServerLostError(f"{path}: {error}") from error

    async def command(self, path: str, body: Any, action: str) -> None:
        """Send a request that changes the server and wait until it reports success.

        The request may take ``update_timeout_seconds``, but the server must not be silent meanwhile: one that is busy
        with weights still answers ``/model_info``, so one that does not for ``health_timeout_seconds`` hangs.

        Args:
            path: of the request.
            body: as JSON.
            action: what the server is asked to do, as the rest of a sentence "the server did not ...".

        Raises:
            ServerLostError: if it does not answer.
            UserError: if it refuses.
        """
        request = asyncio.create_task(self.request("POST", path, self.config.update_timeout_seconds, body))
        try:
            while not (await asyncio.wait([request], timeout=_PROBE_PERIOD_S))[0]:
                try:
                    await self.request("GET", "/model_info", self.config.health_timeout_seconds)
                except ServerLostError as error:
                    if not request.done():
                        raise ServerLostError(f"{path}: silent, and so is {error}") from error
            reply = request.result()
        finally:
            request.cancel()
        if reply.status >= 500:
            raise ServerLostError(f"{path}: status {reply.status} ({reply.excerpt()})")
        try:
            content = reply.json() if reply.body else None  # most commands are answered by a status alone
            refused = isinstance(content, dict) and content.get("success", True) is not True
        except ValueError:
            refused = True
        if refused or reply.status != 200:
            raise UserError(f"{self.url} did not {action}: it answered {reply.excerpt()}")

    async def check_health(self) -> None:
        """Have the server generate a token; raises ServerLostError when it does not."""
        reply = await self.request("GET", "/health_generate", self.config.health_timeout_seconds)
        if reply.status != 200:
            raise ServerLostError(f"health check: status {reply.status}")

    async def model_info(self) -> dict[str, Any]:
        """The answer of ``/model_info``; raises UserError when it is not that of an SGLang server."""
        reply = await self.request("GET", "/model_info", self.config.health_timeout_seconds)
        try:
            info = reply.json()
        except ValueError:
            info = None
        if reply.status != 200 or not isinstance(info, dict) or "weight_version" not in info:
            raise UserError(f"{self.url} is not an SGLang server: /model_info answered {reply.excerpt()}")
        return info

    async def weight_version(self) -> str:
        """The version that the server gives to its weights."""
        return str((await self.model_info()).get("weight_version"))

    async def tensor_parallel_size(self) -> int:
        """Number of tensor-parallel ranks of the server."""
        reply = await self.request("GET", "/server_info", self.config.health_timeout_seconds)
        try:
            return int(reply.json()["tp_size"])
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"{self.url} does not report its tp_size: /server_info answered {reply.excerpt()}"
            ) from None

    async def check_version(self, version: int) -> None:
        """Read the version back; raises UserError when it is not `version`."""
        found = await self.weight_version()
        if found != str(version):
            raise UserError(
                f"{self.url} serves weights of version {found} after it was given {version}: "
                "does another run use this server?"
            )

    async def load_folder(self, state: ServerState, flush_cache: bool = True) -> None:
        """Have the server load the expected weights from their folder, and read the version back.

        Raises:
            ServerLostError: if it does not answer, or when there is no complete folder.
            UserError: if it refuses the weights, or reports another version afterwards.
        """
        version, folder = state.expected_version, state.folder
        if folder is None:
            raise ServerLostError("there is no copy of the current weights for it (rollout.sglang.recovery_copy)")
        if not state.folder_is_complete():
            raise ServerLostError(f"the copy of the current weights, {folder}, is still being written")
        body = {"model_path": str(folder), "weight_version": str(version), "flush_cache": flush_cache}
        action = f"take the weights in {folder} (another model behind it, or a folder that it does not see)"
        try:
            await self.command("/update_weights_from_disk", body, action)
            await self.check_version(version)
        except UserError as error:
            if state.expected_version != version:  # the folder may be gone already, and the server needs newer weights
                raise ServerLostError(f"weights {version} were replaced while it loaded them") from error
            raise
