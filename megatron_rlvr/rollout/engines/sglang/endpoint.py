"""One SGLang server as its client sees it: whether it can be used, what it is asked, the weights it is given."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_rlvr.data.completion import Completion
from megatron_rlvr.errors import UserError
from megatron_rlvr.rollout.engines.sglang.config import SGLangConfig
from megatron_rlvr.rollout.engines.sglang.http import ConnectionLostError, Connections, Reply, ReplyTimeoutError

_PROBE_PERIOD_S = 1.0


class ServerLostError(Exception):
    """A server died, hung, or holds other weights than it should: whatever it was asked must be asked elsewhere."""


@dataclass
class Weights:
    """The weights that servers must hold.

    Attributes:
        version: of them.
        folder: Hugging Face folder from which a server that lost them is given them; None where there is none.
        staleness: how many versions older a completion's tokens may be.
        changing: whether servers are given them at this moment, and need not answer.
    """

    version: int
    folder: Path | None
    staleness: int = 0
    changing: bool = False

    def complete(self) -> bool:
        """Whether the folder can be loaded: it appears under its name when every file is whole."""
        return self.folder is not None and self.folder.is_dir()

    def accept(self, completion: Completion) -> bool:
        return self.version - self.staleness <= completion.oldest_version and completion.weight_version <= self.version


@dataclass
class Endpoint:
    """A server, and what is under way there."""

    url: str
    config: SGLangConfig
    up: bool = False
    why_down: str = "it was not asked yet"
    lost_before: bool = False
    groups: int = 0
    """Prompts that it works on."""
    open: set[asyncio.Task[Reply]] = field(default_factory=set)
    probe_now: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.url = self.url.rstrip("/")
        self.connections = Connections(self.url)

    def lose(self, why: str) -> ServerLostError:
        """Stop using it: what it has not answered yet goes elsewhere."""
        self.up, self.why_down, self.lost_before = False, why, True
        for task in self.open:
            task.cancel()
        self.probe_now.set()
        return ServerLostError(f"{self.url}: {why}")

    async def generate(self, body: bytes) -> Reply:
        """Ask ``/generate``; raises ServerLostError when the server is lost on the way, also to others' knowledge."""
        seconds = self.config.request_timeout_seconds
        request = asyncio.create_task(self.connections.request("POST", "/generate", seconds, body))
        self.open.add(request)
        try:
            await asyncio.wait([request])
        finally:
            self.open.discard(request)
            if not request.done():
                request.cancel()
        if request.cancelled():
            raise ServerLostError(f"{self.url}: {self.why_down}")
        try:
            reply = request.result()
        except ReplyTimeoutError as error:  # slow, perhaps, with this one: it may go on with the others
            raise ServerLostError(f"{self.url}: {error} (rollout.sglang.request_timeout_seconds)") from error
        except ConnectionLostError as error:
            raise self.lose(str(error)) from error
        if reply.status >= 500:
            raise self.lose(f"status {reply.status}")
        return reply

    async def call(self, method: str, path: str, timeout: float, body: Any = None) -> Reply:
        """Any other request; raises ServerLostError when there is no answer within `timeout` seconds."""
        try:
            data = b"" if body is None else json.dumps(body).encode()
            return await self.connections.request(method, path, timeout, data)
        except (ConnectionLostError, ReplyTimeoutError) as error:
            raise ServerLostError(f"{path}: {error}") from error

    async def order(self, path: str, body: Any, what: str) -> None:
        """A request that changes the server and must be answered with success.

        It may take long, but not in silence: a server that is busy with weights still says which model it has, so one
        that does not for ``health_timeout_seconds`` hangs.

        Raises:
            ServerLostError: when it does not answer.
            UserError: when it refuses; begins with the URL and "did not" `what`.
        """
        request = asyncio.create_task(self.call("POST", path, self.config.update_timeout_seconds, body))
        try:
            while not (await asyncio.wait([request], timeout=_PROBE_PERIOD_S))[0]:
                try:
                    await self.call("GET", "/model_info", self.config.health_timeout_seconds)
                except ServerLostError as error:
                    if not request.done():
                        raise ServerLostError(f"{path}: silent, and so is {error}") from error
            reply = request.result()
        finally:
            request.cancel()
        if reply.status >= 500:
            raise ServerLostError(f"{path}: status {reply.status} ({reply.excerpt()})")
        try:
            content = reply.json() if reply.body else None  # most orders say nothing but the status
            refused = isinstance(content, dict) and content.get("success", True) is not True
        except ValueError:
            refused = True
        if refused or reply.status != 200:
            raise UserError(f"{self.url} did not {what}: it answered {reply.excerpt()}")

    async def check_health(self) -> None:
        reply = await self.call("GET", "/health_generate", self.config.health_timeout_seconds)
        if reply.status != 200:
            raise ServerLostError(f"health check: status {reply.status}")

    async def model_info(self) -> dict[str, Any]:
        reply = await self.call("GET", "/model_info", self.config.health_timeout_seconds)
        try:
            info = reply.json()
        except ValueError:
            info = None
        if reply.status != 200 or not isinstance(info, dict) or "weight_version" not in info:
            raise UserError(f"{self.url} is no SGLang server: /model_info answered {reply.excerpt()}")
        return info

    async def weight_version(self) -> str:
        return str((await self.model_info()).get("weight_version"))

    async def tensor_parallel_size(self) -> int:
        """Over how many ranks the server spreads its model."""
        reply = await self.call("GET", "/server_info", self.config.health_timeout_seconds)
        try:
            return int(reply.json()["tp_size"])
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{self.url} does not tell its tp_size: /server_info answered {reply.excerpt()}") from None

    async def check_version(self, version: int) -> None:
        """Read the version back; raises UserError when it is another."""
        found = await self.weight_version()
        if found != str(version):
            raise UserError(
                f"{self.url} serves weights of version {found} after it was given {version}: "
                "does another run use this server?"
            )

    async def load_folder(self, weights: Weights, flush: bool = True) -> None:
        """Have the server load weights from their folder, and read the version back.

        Raises:
            ServerLostError: when it does not answer, or there is no folder.
            UserError: when it refuses them, or names another version afterwards.
        """
        version, folder = weights.version, weights.folder
        if folder is None:
            raise ServerLostError("there is no copy of the current weights for it (rollout.sglang.recovery_copy)")
        if not weights.complete():
            raise ServerLostError(f"the copy of the current weights, {folder}, is still being written")
        body = {"model_path": str(folder), "weight_version": str(version), "flush_cache": flush}
        what = f"take the weights in {folder} (another model behind it, or a folder that it does not see)"
        try:
            await self.order("/update_weights_from_disk", body, what)
            await self.check_version(version)
        except UserError as error:
            if weights.version != version:  # the folder may be gone already: newer ones are what it needs
                raise ServerLostError(f"weights {version} were replaced while it loaded them") from error
            raise
