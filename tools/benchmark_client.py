"""CPU time that the rollout's client costs the training process: ``python tools/benchmark_client.py [--url URL]``.

Without a URL the server is a process of this program that answers every request at once with a reply made before, so
that no time passes but the exchange's own. With one it is a real SGLang server, whose model does not matter.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from megatron_rlvr.data.completion import Completion
from megatron_rlvr.rollout.engines.base import GroupRequest
from megatron_rlvr.rollout.engines.sglang.client import Client
from megatron_rlvr.rollout.engines.sglang.config import SGLangConfig
from megatron_rlvr.rollout.engines.sglang.server_state import ServerState
from megatron_rlvr.rollout.sampling import SamplingPolicy


@cache
def canned_reply(samples: int, tokens: int) -> bytes:
    ids = random.Random(0).choices(range(150_000), k=tokens)
    entries = [[-random.Random(i).random(), i, None] for i in ids]
    meta = {"finish_reason": {"type": "length"}, "weight_version": "0", "output_token_logprobs": entries}
    body = json.dumps([{"output_ids": ids, "meta_info": meta}] * samples, separators=(",", ":")).encode()
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body


def serve(port: Any, samples: int, tokens: int) -> None:
    """Answer for ever; the port goes to `port`."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
                await reader.readexactly(int(head.split("content-length:")[1].split("\r\n")[0]))
                if "post /generate" in head:
                    writer.write(canned_reply(samples, tokens))
                else:
                    body = b'{"weight_version":"0"}'
                    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    async def main() -> None:
        server = await asyncio.start_server(answer, "127.0.0.1", 0, limit=2**20)
        port.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(main())


@contextmanager
def canned_server(samples: int, tokens: int) -> Iterator[str]:
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.Process(target=serve, args=(theirs, samples, tokens), daemon=True)
    process.start()
    try:
        yield f"http://127.0.0.1:{ours.recv()}"
    finally:
        process.terminate()
        process.join()


def rollout(url: str, prompts: list[list[int]], sampling: SamplingPolicy, concurrency: int) -> list[Completion]:
    requests = [GroupRequest(prompt, range(sampling.samples)) for prompt in prompts]
    state = ServerState(0, folder=None, max_staleness=10**9)

    async def ask() -> list[Completion]:
        async with Client([url], SGLangConfig(concurrency=concurrency), state) as client:
            client.endpoints[0].up = True  # no health check, which takes SGLang a second
            return [completion for group in await client.generate(requests, sampling) for completion in group]

    return asyncio.run(ask())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", help="of a real server")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--vocabulary", type=int, default=100, help="prompts are drawn from so many tokens")
    parser.add_argument("--repeat", type=int, default=3)
    given = parser.parse_args()
    draw = random.Random(0)
    prompts = [draw.choices(range(3, given.vocabulary), k=given.prompt_tokens) for _ in range(given.prompts)]
    sampling = SamplingPolicy(samples=given.samples, max_tokens=given.tokens)

    def measure(url: str, name: str) -> None:
        for _ in range(given.repeat):
            cpu, wall = time.process_time(), time.perf_counter()
            completions = rollout(url, prompts, sampling, given.concurrency)
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
            count = len(completions)
            tokens = sum(len(c.token_ids) for c in completions)
            print(
                f"{name}: {count} completions, {tokens} tokens in {wall:.2f} s; client CPU {cpu:.3f} s = "
                f"{100 * cpu / wall:.1f} % of it, {1e6 * cpu / count:.0f} us a completion, "
                f"{1e6 * cpu / tokens:.2f} us a token"
            )

    with canned_server(given.samples, given.tokens) as url:
        measure(url, "answers at once")
    if given.url:
        measure(given.url, "SGLang")


if __name__ == "__main__":
    main()
