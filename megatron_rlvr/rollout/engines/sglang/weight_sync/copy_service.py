"""The process of a node that keeps its `LocalCopy` for the trainer: an HTTP server beside the SGLang servers there.

A delta or full weights are a folder with checksums, and the SHA-256 of its list of checksums names it. A node that sees
this folder under the trainer's path reads it there; any other receives its files over HTTP.

- ``GET /model_info`` is answered at once, also while a copy is written.
- ``POST /offer`` announces a folder. Its JSON body has ``root`` (where the copy belongs), ``folder`` and ``checksum``
  (of its list); the answer says with ``seen`` whether this node sees the folder.
- ``POST /files/CHECKSUM/NAME`` has the bytes of a file of the folder that was offered last, for a node that does not.
- ``POST /weights`` takes the weights. Its body is that of the offer and, for full weights, ``version`` and ``chain``.

Answers have ``success`` and ``message``, as SGLang's have.
"""

from __future__ import annotations

import hmac
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BufferedIOBase
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from megatron_rlvr.checked_input import InvalidInputError, field, parse_object
from megatron_rlvr.checksums import LIST, DamagedError, digest
from megatron_rlvr.errors import UserError
from megatron_rlvr.rollout.engines.sglang.server_key import headers
from megatron_rlvr.rollout.engines.sglang.weight_sync.local_copy import LocalCopy, StaleCopyError

OFFER, FILES, UPDATE = "/offer", "/files", "/weights"
"""Paths of the requests to announce a folder, to send a file of it, and to take its weights."""
_LARGEST_REQUEST = 2**16
_POLL_S = 0.5


@contextmanager
def copy_service(host: str, key: str) -> Iterator[str]:
    """Run the service of this node in a thread, for the duration of the block; yields its URL.

    The copy begins with the first request for it.

    Args:
        host: address to listen at.
        key: the key that requests must carry.
    """
    copies: list[LocalCopy] = []
    one_at_a_time = threading.Lock()

    def copy_at(root: Path) -> LocalCopy:
        if not copies or copies[0].root != root:  # another trainer uses these servers now
            while copies:
                copies.pop().close()
            copies.append(LocalCopy(root))
        return copies[0]

    def offer(request: dict[str, Any]) -> dict[str, Any]:
        root, folder, checksum = _folder(request)
        with one_at_a_time:
            copy = copy_at(root)
            seen = _holds(folder, checksum)
            if not seen:
                copy.expect(checksum)
            return {"seen": seen}

    def receive(path: str, file: BufferedIOBase, length: int) -> dict[str, Any]:
        checksum, _, name = unquote(path).partition("/")
        if not copies:
            raise StaleCopyError("nothing was offered")
        copies[0].receive(checksum, name, file, length)
        return {}

    def update(request: dict[str, Any]) -> dict[str, Any]:
        root, folder, checksum = _folder(request)
        with one_at_a_time:
            copy = copy_at(root)
            if not _holds(folder, checksum):
                folder = copy.incoming(checksum)
            if not _holds(folder, checksum):
                raise DamagedError(f"{folder} is missing, or has another {LIST}")
            if "chain" in request:
                copy.take_full(folder, field(request, "version", int, at_least=0), field(request, "chain", str))
            else:
                copy.apply(folder)
        return {}

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = 3600

        def do_GET(self) -> None:
            version = copies[0].version if copies else None
            self._answer(200 if self._authorized() else 401, {"weight_version": str(version)})

        def do_POST(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            is_file = self.path.startswith(f"{FILES}/")
            known = is_file or (self.path in (OFFER, UPDATE) and length <= _LARGEST_REQUEST)
            if not self._authorized() or not known:
                self.close_connection = True  # the body is not read
                self._answer(404 if self._authorized() else 401, {"success": False, "message": "refused"})
                return
            try:
                if is_file:
                    result = receive(self.path.removeprefix(f"{FILES}/"), self.rfile, length)
                else:
                    work = offer if self.path == OFFER else update
                    result = work(parse_object(self.rfile.read(length)))
                self._answer(200, {"success": True, "message": "", **result})
            except (StaleCopyError, DamagedError, InvalidInputError, UserError) as error:
                self.close_connection = is_file  # its body may not have been read to the end
                self._answer(400, {"success": False, "message": str(error)})

        def _authorized(self) -> bool:
            expected = headers(key)["Authorization"]
            return hmac.compare_digest(self.headers.get("Authorization", "").encode(), expected.encode())

        def _answer(self, status: int, content: dict[str, Any]) -> None:
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            if self.close_connection:
                self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: Any) -> None:  # a trainer that was killed closes its connections
            pass

    server = Server((host, 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(_POLL_S,), name="weights-copy", daemon=True)
    thread.start()
    try:
        yield f"http://{host}:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
        for copy in copies:
            copy.close()


def _folder(request: dict[str, Any]) -> tuple[Path, Path, str]:
    """Return where the copy belongs, the folder that was offered, and the checksum of its list."""
    root, folder, checksum = (field(request, name, str) for name in ("root", "folder", "checksum"))
    return Path(root), Path(folder), checksum


def _holds(folder: Path, checksum: str) -> bool:
    """Whether this node sees the folder that was offered, and not another one with the same path."""
    try:
        return digest(folder / LIST) == checksum
    except OSError:
        return False
