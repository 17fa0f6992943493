"""A local server that implements the part of SGLang's HTTP interface that the client needs, and fails on request."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = tuple[int, Any]


class FakeServer:
    """Answers each prompt of ``/generate`` with one token, the sum of its token ids.

    A reply therefore shows which prompt it belongs to.

    Attributes:
        version: version of the weights, as SGLang reports it.
        delay: seconds before an answer to ``/generate``; only for tests whose outcome does not depend on it.
        wait_before_answer: called before an answer to ``/generate``, while its prompts count as in flight.
        healthy: False makes health checks hang.
        dead: closes the connection of every request.
        silent: keeps every connection and never answers.
        answer: computes the answer to ``/generate``.
        control: computes the answer to commands other than loading weights.
        key: the key that it demands, except for health checks; None if it demands none.
        prompts: prompts of all requests to ``/generate``.
        loads: bodies of the requests to load weights.
        running, most_running: number of prompts in flight, and its maximum so far.
        answered: number of prompts that are no longer in flight.
    """

    def __init__(self) -> None:
        self.version = "0"
        self.delay = 0.0
        self.wait_before_answer: Callable[[], None] = lambda: None
        self.healthy = True
        self.dead = False
        self.silent = False
        self.answer: Callable[[dict[str, Any]], Reply] = self.completion
        self.key: str | None = None
        self.prompts: list[list[int]] = []
        self.loads: list[dict[str, Any]] = []
        self.control: Callable[[str, dict[str, Any]], Reply] = lambda path, body: (404, {})
        self.running = self.most_running = self.answered = 0
        self.url = ""
        self._lock = threading.Lock()

    def completion(self, body: dict[str, Any]) -> Reply:
        completions = []
        for token in map(sum, body["input_ids"]):
            meta = {"finish_reason": {"type": "length"}, "output_token_logprobs": [[-0.5, token, None]]}
            completions.append({"output_ids": [token], "meta_info": meta | {"weight_version": self.version}})
        return 200, completions

    def generate(self, body: dict[str, Any]) -> Reply:
        with self._lock:
            self.prompts += body["input_ids"]
            self.running += len(body["input_ids"])
            self.most_running = max(self.most_running, self.running)
        time.sleep(self.delay)
        self.wait_before_answer()
        with self._lock:
            self.running -= len(body["input_ids"])
            self.answered += len(body["input_ids"])
        return self.answer(body)

    def load(self, body: dict[str, Any]) -> Reply:
        self.loads.append(body)
        self.version = body["weight_version"]
        return 200, {"success": True, "message": ""}

    def reply(self, path: str, body: dict[str, Any]) -> Reply:
        while self.silent:
            time.sleep(0.05)
        if self.dead:
            return 0, None
        if path == "/generate":
            return self.generate(body)
        if path == "/update_weights_from_disk":
            return self.load(body)
        if path == "/model_info":
            return 200, {
                "weight_version": self.version,
                "model_type": "qwen2",
                "architectures": ["Qwen2ForCausalLM"],
            }
        if path != "/health_generate":
            return self.control(path, body)
        while not self.healthy:  # a hung server keeps the connection and does not answer
            time.sleep(0.05)
        return 200, {}


@contextmanager
def fake_server() -> Iterator[FakeServer]:
    fake = FakeServer()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or "{}")
            known = fake.key is None or self.headers.get("Authorization") == f"Bearer {fake.key}"
            allowed = known or self.path.startswith("/health")
            status, content = fake.reply(self.path, body) if allowed else (401, {"error": "Unauthorized"})
            if status == 0:  # close the connection without an answer
                self.close_connection = True
                return
            data = content.encode() if isinstance(content, str) else json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_POST = do_GET  # noqa: N815

        def log_message(self, *_: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 256

        def handle_error(self, *_: Any) -> None:  # clients that close connections are expected
            pass

    server = Server(("127.0.0.1", 0), Handler)
    fake.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield fake
    finally:
        fake.healthy, fake.silent = True, False
        server.shutdown()
        server.server_close()
