"""A stand-in for ``python -m sglang.launch_server``: transformers behind the HTTP of SGLang that the trainer uses.

Unlike SGLang on the CPU it obeys ``sampling_seed``. A run whose servers were killed can therefore be compared with an
undisturbed one.
"""

import argparse
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM


class Policy:
    def __init__(self, folder: str, version: str):
        self.lock = threading.Lock()
        self.folder = folder
        self.load(folder, version)

    def load(self, folder: str, version: str) -> None:
        with self.lock:
            self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
            self.version = version

    @torch.no_grad()
    def complete(self, prompt: list[int], parameters: dict[str, Any]) -> dict[str, Any]:
        """Return one completion, computed alone, because a batch would change its rounding."""
        generator = torch.Generator().manual_seed(parameters["sampling_seed"])
        stop = set(parameters.get("stop_token_ids") or [])
        tokens: list[int] = []
        scored = []
        with self.lock:
            state = self.model(torch.tensor([prompt]), use_cache=True)
            while True:
                logprobs = torch.log_softmax(state.logits[0, -1].float() / parameters["temperature"], -1)
                token = int(torch.multinomial(logprobs.exp(), 1, generator=generator))
                tokens.append(token)
                scored.append([float(logprobs[token]), token, None])
                if token in stop or len(tokens) == parameters["max_new_tokens"]:
                    break
                state = self.model(torch.tensor([[token]]), past_key_values=state.past_key_values, use_cache=True)
            version = self.version
        reason = {"type": "stop" if tokens[-1] in stop else "length"}
        meta = {"finish_reason": reason, "output_token_logprobs": scored, "weight_version": version}
        return {"output_ids": tokens, "meta_info": meta}

    def reply(self, path: str, body: dict[str, Any]) -> Any:
        if path == "/generate":
            prompts, parameters = body["input_ids"], body["sampling_params"]
            if isinstance(prompts[0], list):
                return [self.complete(p, s) for p, s in zip(prompts, parameters, strict=True)]
            return self.complete(prompts, parameters)
        if path == "/update_weights_from_disk":
            self.load(body["model_path"], body["weight_version"])
            return {"success": True, "message": ""}
        if path == "/model_info":
            config = AutoConfig.from_pretrained(self.folder)
            info = {"model_type": config.model_type, "architectures": config.architectures}
            return info | {"weight_version": self.version, "model_path": self.folder}
        return {}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model-path", required=True)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--weight-version", default="default")
    parser.add_argument("--api-key")
    options, _ = parser.parse_known_args()
    torch.set_num_threads(1)
    policy = Policy(options.model_path, options.weight_version)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or "{}")
            health = self.path.startswith("/health")
            allowed = health or self.headers.get("Authorization") == f"Bearer {options.api_key}"
            data = json.dumps(policy.reply(self.path, body) if allowed else {"error": "Unauthorized"}).encode()
            self.send_response(200 if allowed else 401)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_POST = do_GET  # noqa: N815

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer((options.host, options.port), Handler)
    server.daemon_threads = True
    server.serve_forever()


if __name__ == "__main__":
    main()
