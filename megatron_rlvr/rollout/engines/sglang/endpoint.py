"""One SGLang server as a client sees it: whether it can be used, and the requests to it."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_rlvr import checked_input
from megatron_rlvr.errors import UserError
from megatron_rlvr.rollout.engines.sglang.config import SGLangConfig
from megatron_rlvr.rollout.engines.sglang.http import ConnectionLostError, Connections, Reply, ReplyTimeoutError
from megatron_rlvr.rollout.engines.sglang.server_key import KEY_VARIABLE
from megatron_rlvr.rollout.engines.sglang.server_state import ServerState

_PROBE_PERIOD_S = 1.0


class ServerLostError(Exception):
    """A server died, hung, or holds the wrong weights. Its requests must be sent to another server, or again later."""


@dataclass
class Endpoint:
    """A server and the open requests of a client there. Belongs to one event loop.

    Attributes:
        url: URL of the server, without a trailing slash.
        config: timeouts.
        up: whether the client sends it prompts.
        why_down: the reason while it is not `up`.
        was_lost: whether it was ever lost.
        prompts_in_flight: number of prompts that it works on for this client.
        open_requests: the requests of these prompts.
        probe_now: set this event to have the server probed at once.
        key: the key that the server demands; None if it demands none.
    """

    url: str
    config: SGLangConfig
    up: bool = False
    why_down: str = "it was not probed yet"
    was_lost: bool = False
    prompts_in_flight: int = 0
    open_requests: set[asyncio.Task[Reply]] = field(default_factory=set)
    probe_now: asyncio.Event = field(default_factory=asyncio.Event)
    key: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self.url = self.url.rstrip("/")
        self.connections = Connections(self.url, self.key)

    def mark_lost(self, why: str) -> ServerLostError:
        """Stop using the server and cancel its open requests; returns the exception to raise."""
        self.up, self.why_down, self.was_lost = False, why, True
        for task in self.open_requests:
            task.cancel()
        self.probe_now.set()
        return ServerLostError(f"{self.url}: {why}")

    async def generate(self, body: bytes, largest_reply: int) -> Reply:
        """Send a request to ``/generate``; a reply of more than `largest_reply` bytes counts as a lost server.

        Raises:
            ServerLostError: if there is no usable answer, or the server is marked as lost meanwhile.
        """
        timeout = self.config.request_timeout_seconds
        request = asyncio.create_task(self.connections.request("POST", "/generate", timeout, body, largest_reply))
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
        except ReplyTimeoutError as error:
            # The server may be slow only for this prompt, so its other requests continue.
            raise ServerLostError(f"{self.url}: {error} (rollout.sglang.request_timeout_seconds)") from error
        except ConnectionLostError as error:
            raise self.mark_lost(str(error)) from error
        if reply.status >= 500:
            raise self.mark_lost(f"status {reply.status}")
        return self._authorized(reply)

    async def request(self, method: str, path: str, timeout: float, body: Any = None) -> Reply:
        """Send any other request. A body that is a path is the bytes of that file, and any other becomes JSON.

        Raises:
            ServerLostError: if there is no answer within `timeout` seconds.
            UserError: if the server refuses the key.
        """
        try:
            data = body if isinstance(body, Path) else b"" if body is None else json.dumps(body).encode()
            reply = await self.connections.request(method, path, timeout, data)
        except (ConnectionLostError, ReplyTimeoutError) as error:
            raise ServerLostError(f"{path}: {error}") from error
        return self._authorized(reply)

    def _authorized(self, reply: Reply) -> Reply:
        """Return the reply; raises UserError if the server refuses this client's key."""
        if reply.status not in (401, 403):
            return reply
        found = "it demands a key" if self.key is None else "it demands another key"
        raise UserError(
            f"{self.url} refuses this run (status {reply.status}): {found}; set {KEY_VARIABLE} to the --api-key that "
            "the server was started with"
        )

    async def command(self, path: str, body: Any, action: str) -> dict[str, Any]:
        """Send a request that changes the server and wait until it reports success.

        Args:
            path: path of the request.
            body: body of the request; see `request`.
            action: what the server is asked to do; completes "the server did not ...".

        Returns:
            the JSON object that it answers; empty if the answer is another one.

        Raises:
            ServerLostError: if it does not answer; see `patient_request`.
            UserError: if it refuses.
        """
        reply = await self.patient_request(path, body)
        if reply.status >= 500:
            raise ServerLostError(f"{path}: status {reply.status} ({reply.excerpt()})")
        try:
            content = reply.json() if reply.body else None  # most commands are answered with a status only
            refused = isinstance(content, dict) and content.get("success", True) is not True
        except ValueError:
            refused = True
        if refused or reply.status != 200:
            raise UserError(f"{self.url} did not {action}: it answered {reply.excerpt()}")
        return content if isinstance(content, dict) else {}

    async def patient_request(self, path: str, body: Any = None) -> Reply:
        """Send a POST request that may take ``update_timeout_seconds``; `body` as in `request`.

        Meanwhile the server must answer ``/model_info`` within ``health_timeout_seconds``, which it does even while it
        loads weights; otherwise it counts as hung.

        Raises:
            ServerLostError: if it does not answer.
            UserError: if it refuses the key.
        """
        request = asyncio.create_task(self.request("POST", path, self.config.update_timeout_seconds, body))
        try:
            while not (await asyncio.wait([request], timeout=_PROBE_PERIOD_S))[0]:
                try:
                    await self.request("GET", "/model_info", self.config.health_timeout_seconds)
                except ServerLostError as error:
                    if not request.done():
                        raise ServerLostError(f"{path}: silent, and so is {error}") from error
            return request.result()
        finally:
            request.cancel()

    async def check_health(self) -> None:
        """Let the server generate a token; raises ServerLostError if it does not."""
        reply = await self.request("GET", "/health_generate", self.config.health_timeout_seconds)
        if reply.status != 200:
            raise ServerLostError(f"health check: status {reply.status}")

    async def model_info(self) -> dict[str, Any]:
        """Return the answer to ``/model_info``.

        Raises:
            ServerLostError: if the server does not answer.
            UserError: if it is not an SGLang server.
        """
        reply = await self.request("GET", "/model_info", self.config.health_timeout_seconds)
        try:
            info = reply.json()
        except ValueError:
            info = None
        if reply.status != 200 or not isinstance(info, dict) or "weight_version" not in info:
            raise UserError(
                f"{self.url} is not an SGLang server: /model_info answered {reply.excerpt()}; correct "
                "rollout.sglang.urls"
            )
        return info

    async def weight_version(self) -> str:
        """Return the version of the weights that the server reports."""
        return str((await self.model_info()).get("weight_version"))

    async def tensor_parallel_size(self) -> int:
        """Return the number of tensor-parallel ranks of the server."""
        reply = await self.request("GET", "/server_info", self.config.health_timeout_seconds)
        try:
            return checked_input.field(reply.json(), "tp_size", int, at_least=1, at_most=2**16)
        except checked_input.InvalidInputError:
            raise UserError(
                f"{self.url} does not report its tp_size: /server_info answered {reply.excerpt()}"
            ) from None

    async def check_version(self, version: int) -> None:
        """Read the version back; raises UserError if it is not `version`."""
        served_version = await self.weight_version()
        if served_version != str(version):
            raise UserError(
                f"{self.url} serves weights of version {served_version} after it was sent version {version}: check "
                "that no other run uses this server"
            )

    async def load_folder(self, state: ServerState, flush_cache: bool = True) -> None:
        """Load the expected weights on the server from their folder, and read the version back.

        Raises:
            ServerLostError: if the server does not answer, or there is no complete folder.
            UserError: if the server refuses the weights, or reports another version afterwards.
        """
        version, folder = state.expected_version, state.folder
        if folder is None:
            raise ServerLostError("there is no copy of the current weights to load (rollout.sglang.recovery_copy)")
        if self.url in state.without_folder:
            raise ServerLostError("its node has no copy of the current weights (rollout.sglang.weight_sync=delta)")
        if not state.folder_is_complete():
            raise ServerLostError(f"the copy of the current weights, {folder}, is still being written")
        body = {"model_path": str(folder), "weight_version": str(version), "flush_cache": flush_cache}
        action = f"load the weights in {folder} (check that it serves the same model and sees this folder)"
        try:
            await self.command("/update_weights_from_disk", body, action)
            await self.check_version(version)
        except UserError as error:
            if state.expected_version != version:  # the folder may be deleted already, and newer weights are needed
                raise ServerLostError(f"weights {version} were replaced while it loaded them") from error
            raise
