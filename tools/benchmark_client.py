"""Measure the CPU time of the SGLang client in the training process: python tools/benchmark_client.py [--url URL].

The server is a child process that answers every request at once with a canned reply, so only the client's work takes
time. ``--url`` also measures a real SGLang server; its model does not matter.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import random
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any

from megatron_rlvr.data.completion import Completion
from megatron_rlvr.rollout.engines.base import GroupRequest
from megatron_rlvr.rollout.engines.sglang.client import Client
from megatron_rlvr.rollout.engines.sglang.config import SGLangConfig
from megatron_rlvr.rollout.engines.sglang.server_state import ServerState
from megatron_rlvr.rollout.sampling import SamplingSettings


@cache
def canned_reply(samples: int, tokens: int) -> bytes:
    """An HTTP reply of ``/generate`` with `samples` completions of `tokens` tokens each."""
    ids = random.Random(0).choices(range(150_000), k=tokens)
    entries = [[-random.Random(i).random(), i, None] for i in ids]
    meta = {"finish_reason": {"type": "length"}, "weight_version": "0", "output_token_logprobs": entries}
    body = json.dumps([{"output_ids": ids, "meta_info": meta}] * samples, separators=(",", ":")).encode()
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body


def serve(port: Any, samples: int, tokens: int) -> None:
    """Answer requests until killed; sends the port number through the pipe `port`."""

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
    """A server process with canned replies; yields its URL."""
    receiver, sender = multiprocessing.Pipe()
    process = multiprocessing.Process(target=serve, args=(sender, samples, tokens), daemon=True)
    process.start()
    try:
        yield f"http://127.0.0.1:{receiver.recv()}"
    finally:
        process.terminate()
        process.join()


def rollout(
    url: str, prompts: list[list[int]], sampling: SamplingSettings, config: SGLangConfig, key: str | None = None
) -> list[Completion]:
    """Generate the samples of all prompts with the SGLang client."""
    requests = [GroupRequest(prompt, range(sampling.samples)) for prompt in prompts]
    state = ServerState(0, folder=None, max_staleness=10**9, key=key)

    async def ask() -> list[Completion]:
        async with Client([url], config, state) as client:
            client.endpoints[0].up = True  # no health check, which takes SGLang a second
            return [completion for group in await client.generate(requests, sampling) for completion in group]

    return asyncio.run(ask())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", help="URL of a real SGLang server to measure, too")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--vocabulary", type=int, default=100, help="number of token ids that prompts are drawn from")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--key", help="the key of that server")
    options = parser.parse_args()
    rng = random.Random(0)
    sampling = SamplingSettings(samples=options.samples, max_tokens=options.tokens)

    def measure(url: str, name: str, config: SGLangConfig) -> float:
        prompts = [rng.choices(range(3, options.vocabulary), k=options.prompt_tokens) for _ in range(options.prompts)]
        cpu, wall = time.process_time(), time.perf_counter()
        completions = rollout(url, prompts, sampling, config, options.key)
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        count = len(completions)
        tokens = sum(len(c.token_ids) for c in completions)
        print(
            f"{name}: {count} completions, {tokens} tokens in {wall:.2f} s; client CPU {cpu:.3f} s = "
            f"{100 * cpu / wall:.1f} % of the time, {1e6 * cpu / count:.0f} us per "
            f"completion, {1e6 * cpu / tokens:.2f} us per token"
        )
        return wall

    config = SGLangConfig(concurrency=options.concurrency, prefill_once_from=0)
    with canned_server(options.samples, options.tokens) as url:
        for _ in range(options.repeat):
            measure(url, "canned replies", config)
    if options.url:
        once = replace(config, prefill_once_from=1)
        ratios = []
        for _ in range(options.repeat):
            each = measure(options.url, "SGLang, prompts computed per sample", config)
            ratios.append(each / measure(options.url, "SGLang, prompts computed once", once))
        print(
            f"computing prompts once is {statistics.median(ratios):.2f} times as fast ({sorted(ratios)[0]:.2f} to "
            f"{sorted(ratios)[-1]:.2f})"
        )


if __name__ == "__main__":
    main()
