"""The process of a node that keeps its `LocalCopy` for the trainer: an HTTP server beside the SGLang servers there.

It understands two requests. ``GET /model_info`` is answered at once, also while a copy is written. ``POST /weights``
has a JSON body with ``root`` (where the copy belongs), ``folder`` (a delta or full weights, which this node sees) and,
for full weights, ``version`` and ``chain``; the answer has ``success`` and ``message``, as SGLang's have.
"""

from __future__ import annotations

import hmac
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from megatron_rlvr.checked_input import InvalidInputError, field, parse_object
from megatron_rlvr.checksums import DamagedError
from megatron_rlvr.errors import UserError
from megatron_rlvr.rollout.engines.sglang.server_key import headers
from megatron_rlvr.rollout.engines.sglang.weight_sync.local_copy import LocalCopy, StaleCopyError

UPDATE = "/weights"
"""Path of the request to take new weights."""
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

    def update(request: dict[str, Any]) -> None:
        root, folder = Path(field(request, "root", str)), Path(field(request, "folder", str))
        with one_at_a_time:
            if not copies or copies[0].root != root:  # another trainer uses these servers now
                while copies:
                    copies.pop().close()
                copies.append(LocalCopy(root))
            if "chain" in request:
                copies[0].take_full(folder, field(request, "version", int, at_least=0), field(request, "chain", str))
            else:
                copies[0].apply(folder)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = 3600

        def do_GET(self) -> None:
            version = copies[0].version if copies else None
            self._answer(200 if self._authorized() else 401, {"weight_version": str(version)})

        def do_POST(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            if not self._authorized() or self.path != UPDATE or length > _LARGEST_REQUEST:
                self.close_connection = True  # the body is not read
                self._answer(404 if self._authorized() else 401, {"success": False, "message": "refused"})
                return
            try:
                update(parse_object(self.rfile.read(length)))
                self._answer(200, {"success": True, "message": ""})
            except (StaleCopyError, DamagedError, InvalidInputError, UserError) as error:
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
