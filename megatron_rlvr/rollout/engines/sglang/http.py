"""The subset of HTTP/1.1 that SGLang servers need, in a tenth of the CPU time of a general client.

A rollout keeps hundreds of requests open in the training process. General clients search all of their connections for
every request and parse replies in Python. Here each server has a stack of idle connections, and a reply is a header
followed by a known number of bytes.
"""

from __future__ import annotations

import asyncio
import ssl
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from megatron_rlvr.checked_input import parse_json
from megatron_rlvr.rollout.engines.sglang.server_key import headers

_CONNECT_TIMEOUT_S = 5.0
_LARGEST_HEADER = 2**16
LARGEST_REPLY = 64 * 2**20
"""Default maximum size of a reply, in bytes."""


class ConnectionLostError(Exception):
    """The server cannot be reached, closed the connection, or does not speak HTTP."""


class ReplyTimeoutError(Exception):
    """The reply was not complete before the deadline."""


@dataclass(frozen=True)
class Reply:
    """A complete reply of a server.

    Attributes:
        status: HTTP status.
        body: body without transfer encoding.
    """

    status: int
    body: bytes

    def json(self) -> Any:
        """Return the parsed body; raises InvalidInputError if it is not JSON."""
        return parse_json(self.body, limit=len(self.body))

    def excerpt(self) -> str:
        """Return the beginning of the body on one line, for an error message."""
        return " ".join(self.body[:300].decode(errors="replace").split()) or f"nothing (status {self.status})"


@dataclass
class Connections:
    """Keep-alive connections to one server within one event loop.

    Attributes:
        url: URL of the server.
        key: the key that the server demands; None if it demands none.
        idle: connections without a request; a request takes one of them or opens a new one.
    """

    url: str
    key: str | None = field(default=None, repr=False)
    idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = field(default_factory=list)

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        self.host, self.netloc, self.prefix = parts.hostname or "", parts.netloc, parts.path.rstrip("/")
        self.port = parts.port or (443 if parts.scheme == "https" else 80)
        self.tls = ssl.create_default_context() if parts.scheme == "https" else None

    async def request(
        self, method: str, path: str, timeout: float, body: bytes | Path = b"", largest_reply: int = LARGEST_REPLY
    ) -> Reply:
        """Send a request and read the complete reply.

        Cancelling the request closes its connection, and the server then aborts the request.

        Args:
            method: ``GET`` or ``POST``.
            path: path relative to the server's URL.
            timeout: seconds within which the reply must be complete.
            body: encoded JSON, or a file, which is sent as it is and never held in memory.
            largest_reply: maximum size of the body of the reply, in bytes. A longer one is not read.

        Raises:
            ConnectionLostError: if the server cannot be reached, closes the connection, does not speak HTTP, or sends a
                reply that is too large or compressed; also if the file cannot be read.
            ReplyTimeoutError: if `timeout` passes.
        """
        authorization = "".join(f"{name}: {value}\r\n" for name, value in headers(self.key).items())
        try:
            length = body.stat().st_size if isinstance(body, Path) else len(body)
        except OSError as error:
            raise ConnectionLostError(str(error)) from error
        kind = "application/octet-stream" if isinstance(body, Path) else "application/json"
        head = (
            f"{method} {self.prefix}{path} HTTP/1.1\r\nHost: {self.netloc}\r\n{authorization}"
            f"Content-Type: {kind}\r\nContent-Length: {length}\r\n\r\n"
        ).encode()
        try:
            async with asyncio.timeout(timeout):
                while True:
                    reused = bool(self.idle)
                    reader, writer = self.idle.pop() if reused else await self._connect()
                    try:
                        if isinstance(body, Path):
                            await _send_file(writer, head, body, length)
                        else:
                            writer.write(head + body)
                            await writer.drain()
                        reply, keep = await _read_reply(reader, largest_reply)
                    except (OSError, EOFError, ValueError, asyncio.LimitOverrunError) as error:
                        writer.close()
                        if reused and isinstance(error, OSError | EOFError) and not getattr(error, "partial", b""):
                            continue  # the server has just closed this idle connection, so use another
                        raise ConnectionLostError(f"{type(error).__name__} {error}".strip()) from error
                    except BaseException:
                        writer.close()
                        raise
                    if keep:
                        self.idle.append((reader, writer))
                    else:
                        writer.close()
                    return reply
        except TimeoutError as error:
            raise ReplyTimeoutError(f"no answer within {timeout:g} s") from error

    def close(self) -> None:
        """Close the idle connections."""
        while self.idle:
            self.idle.pop()[1].close()

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        try:
            async with asyncio.timeout(_CONNECT_TIMEOUT_S):
                # The limit is also the size of the read-ahead buffer. A large one reads a reply of megabytes in few
                # reads.
                return await asyncio.open_connection(self.host, self.port, ssl=self.tls, limit=2**20)
        except (OSError, TimeoutError) as error:
            raise ConnectionLostError(f"cannot connect ({error or type(error).__name__})") from error


async def _send_file(writer: asyncio.StreamWriter, head: bytes, path: Path, length: int) -> None:
    """Send a header and `length` bytes of a file. The kernel copies them, except over TLS."""
    writer.write(head)
    await writer.drain()
    if length:  # the event loop refuses to send nothing
        if writer.is_closing():
            raise ConnectionResetError("the server closed the connection")
        with path.open("rb") as file:
            sent = await asyncio.get_running_loop().sendfile(writer.transport, file, 0, length)
        if sent != length:
            raise OSError(f"{path} has only {sent} of its {length} bytes left")


async def _read_reply(reader: asyncio.StreamReader, limit: int) -> tuple[Reply, bool]:
    """Read a reply with a body of at most `limit` bytes; returns it and whether the connection may be used again."""
    header = await reader.readuntil(b"\r\n\r\n")
    if len(header) > _LARGEST_HEADER or not header.startswith(b"HTTP/1."):
        raise ValueError(f"not an HTTP reply: {header[:40]!r}")
    status_line, *lines = header.decode("latin-1").split("\r\n")
    fields = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines) if name}
    if (encoding := fields.get("content-encoding", "identity")) != "identity":
        raise ValueError(f"a reply with the encoding {encoding[:40]!r}, which was not asked for")
    if fields.get("transfer-encoding", "").lower() == "chunked":
        chunks, total = [], 0
        while size := int((await reader.readline()).split(b";")[0], 16):
            total = _checked_size(total + size, limit)
            chunks.append(await reader.readexactly(size))
            await reader.readexactly(2)
        await reader.readuntil(b"\r\n")
        body = b"".join(chunks)
    else:
        body = await reader.readexactly(_checked_size(int(fields.get("content-length", "0")), limit))
    return Reply(int(status_line.split(" ")[1]), body), fields.get("connection", "").lower() != "close"


def _checked_size(size: int, limit: int) -> int:
    if size > limit:
        raise ValueError(f"a reply of more than {limit} bytes")
    return size
