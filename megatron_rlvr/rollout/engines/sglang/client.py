"""The asynchronous client of one or several SGLang servers: every prompt is answered once, whichever server dies."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import Callable, Sequence

from megatron_rlvr.data.completion import Completion
from megatron_rlvr.errors import UserError
from megatron_rlvr.rollout.engines.base import EngineLostError, Finished, SamplingPolicy
from megatron_rlvr.rollout.engines.sglang.config import SGLangConfig
from megatron_rlvr.rollout.engines.sglang.endpoint import Endpoint, ServerLostError, Weights
from megatron_rlvr.rollout.engines.sglang.protocol import generate_body, read_completions

_PROBE_PERIOD_S = 1.0


class Client:
    """Talks to the servers behind `urls`, within one running event loop.

    A watch on each server probes it all the time, so that one that hangs without closing its connections is found
    a few seconds after ``health_timeout_seconds``; its open requests are cancelled and asked elsewhere, or again when
    it is back.

    Args:
        urls: of the servers.
        config: limits and timeouts.
        weights: what a server must hold before it is asked anything; may change while the client works.
        failure: gives the reason why no server will come back any more, if there is one.
    """

    def __init__(
        self,
        urls: Sequence[str],
        config: SGLangConfig,
        weights: Weights,
        failure: Callable[[], str | None] = lambda: None,
    ):
        self.config, self.weights, self.failure = config, weights, failure
        self.endpoints = [Endpoint(url, config) for url in urls]
        self._room = asyncio.Event()

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *_: object) -> None:
        for endpoint in self.endpoints:
            endpoint.connections.close()

    async def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingPolicy,
        seeds: Sequence[int],
        finished: Finished | None = None,
    ) -> list[Completion]:
        """See `RolloutEngine.generate`; those of prompts that were no longer needed (see `Finished`) are left out.

        Raises:
            UserError: when a server refuses a request or answers nonsense.
            EngineLostError: when no server is left.
        """
        count = sampling.samples
        most = max(1, self.config.concurrency // count)
        groups: list[asyncio.Task[list[Completion]]] = []
        enough = False

        async def group(index: int, endpoint: Endpoint) -> list[Completion]:
            nonlocal enough
            seeds_of_it = seeds[index * count : (index + 1) * count]
            completions = await self._group(prompts[index], sampling, seeds_of_it, endpoint, most)
            if finished is not None and not enough and await finished(index, completions):
                enough = True
                for other in groups:
                    if other is not asyncio.current_task():
                        other.cancel()  # closes its connection, at which the server stops working on it
            return completions

        try:
            async with asyncio.TaskGroup() as tasks:
                watches = [tasks.create_task(self._watch(endpoint)) for endpoint in self.endpoints]
                for index in range(len(prompts)):
                    # One prompt after the other as servers have room, so that a quick or a new server gets more.
                    endpoint = await self._claim(most)
                    if enough:
                        break
                    groups.append(tasks.create_task(group(index, endpoint)))
                if groups:
                    await asyncio.wait(groups)
                for watch in watches:
                    watch.cancel()
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None
        return [completion for task in groups if not task.cancelled() for completion in task.result()]

    async def _group(
        self, prompt: Sequence[int], sampling: SamplingPolicy, seeds: Sequence[int], endpoint: Endpoint, most: int
    ) -> list[Completion]:
        """The samples of one prompt, in one request: the server that is claimed for them computes the prompt once."""
        body = generate_body(prompt, sampling, seeds)
        lost: list[str] = []
        while True:
            try:
                return await self._ask(endpoint, body, sampling)
            except ServerLostError as error:
                lost.append(str(error))
            finally:
                endpoint.groups -= 1
                self._room.set()
            if len(lost) >= self.config.attempts:
                raise UserError(
                    f"{len(lost)} SGLang servers were lost under one prompt (rollout.sglang.attempts); "
                    f"the last: {lost[-1]}"
                )
            endpoint = await self._claim(most)

    async def _ask(self, endpoint: Endpoint, body: bytes, sampling: SamplingPolicy) -> list[Completion]:
        completions = read_completions(endpoint.url, await endpoint.generate(body), sampling)
        if completions is None:
            raise endpoint.lose("it aborted a request")
        for completion in completions:
            if not self.weights.accept(completion):
                spans = " then ".join(str(version) for version, _ in completion.version_spans)
                found = spans or completion.weight_version
                raise endpoint.lose(f"it answered with weights {found} instead of {self.weights.version}")
        return completions

    # Which servers there are ----------------------------------------------------------------------------------------

    async def _claim(self, most: int) -> Endpoint:
        """The living server with the fewest prompts, once it has fewer than `most`; the caller's prompt is counted."""
        clock = asyncio.get_running_loop().time
        deadline = clock() + self.config.start_timeout_seconds
        told = False
        while True:
            self._room.clear()
            alive = [e for e in self.endpoints if e.up]
            if alive:
                deadline = clock() + self.config.start_timeout_seconds
                idlest = min(alive, key=lambda e: e.groups)
                if idlest.groups < most:
                    idlest.groups += 1
                    return idlest
            elif reason := self.failure():
                raise EngineLostError(f"no SGLang server is left: {reason}")
            elif clock() > deadline:
                if self.config.when_all_lost == "stop":
                    raise EngineLostError(f"no SGLang server is left: {self._down()}")
                if not told:
                    print(f"warning: no SGLang server is left, waiting for one: {self._down()}", file=sys.stderr)
                    told = True
            await _happens(self._room)

    def _down(self) -> str:
        return "; ".join(f"{e.url}: {e.why_down}" for e in self.endpoints if not e.up)

    async def _watch(self, endpoint: Endpoint) -> None:
        while True:
            endpoint.probe_now.clear()
            try:
                if self.weights.changing:  # a server that loads weights, or is paused for them, need not answer
                    pass
                elif endpoint.up:
                    await endpoint.check_health()
                else:
                    await self.adopt(endpoint)
            except ServerLostError as error:
                if not self.weights.changing:
                    endpoint.lose(str(error))
                    endpoint.probe_now.clear()
            else:
                if not endpoint.up and not self.weights.changing:
                    endpoint.up = True
                    self._room.set()
            await _happens(endpoint.probe_now)

    async def adopt(self, endpoint: Endpoint) -> None:
        """Make sure that a server answers and holds the current weights; give them to it where it does not."""
        if endpoint.lost_before:  # else the watch finds out soon enough: a health check takes SGLang a second
            if self.weights.staleness:  # it may have been lost while it was paused for an update
                await endpoint.order("/continue_generation", {}, "go on")
            await endpoint.check_health()
        if await endpoint.weight_version() != str(self.weights.version):
            await endpoint.load_folder(self.weights)


async def _happens(event: asyncio.Event) -> None:
    """Wait for the event, one probe's period at most."""
    # Not asyncio.wait_for: in Python 3.11 it swallows a cancellation that comes together with the event.
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_PROBE_PERIOD_S):
            await event.wait()
