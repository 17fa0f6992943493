"""The asynchronous client of SGLang servers, which gets one answer for every prompt even if servers die."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import Callable, Sequence

from megatron_rlvr.data.completion import Completion
from megatron_rlvr.errors import UserError
from megatron_rlvr.rollout.engines.base import EngineLostError, GroupRequest, OnGroup
from megatron_rlvr.rollout.engines.sglang.config import SGLangConfig
from megatron_rlvr.rollout.engines.sglang.endpoint import Endpoint, ServerLostError
from megatron_rlvr.rollout.engines.sglang.http import LARGEST_REPLY
from megatron_rlvr.rollout.engines.sglang.launch_arguments import normalized
from megatron_rlvr.rollout.engines.sglang.protocol import generate_body, largest_reply, prefill_body, read_completions
from megatron_rlvr.rollout.engines.sglang.server_state import ServerState
from megatron_rlvr.rollout.sampling import SamplingSettings

_PROBE_PERIOD_S = 1.0


class Client:
    """Sends prompts to the servers at `urls`, within one running event loop.

    A task per server probes it continuously. A server that hangs without closing its connections is therefore detected
    a few seconds after ``health_timeout_seconds``. Its open requests are cancelled and sent to other servers, or sent
    again when it is back.

    Args:
        urls: URLs of the servers.
        config: limits and timeouts.
        state: weights that a server must hold before the client sends it a prompt; may change meanwhile.
        unavailable: returns the reason why no server will come back, or None while one may.
    """

    def __init__(
        self,
        urls: Sequence[str],
        config: SGLangConfig,
        state: ServerState,
        unavailable: Callable[[], str | None] = lambda: None,
    ):
        self.config, self.state, self.unavailable = config, state, unavailable
        self.endpoints = [Endpoint(url, config, key=state.key) for url in urls]
        self._capacity_changed = asyncio.Event()

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *_: object) -> None:
        for endpoint in self.endpoints:
            endpoint.connections.close()

    async def generate(
        self, requests: Sequence[GroupRequest], sampling: SamplingSettings, on_group: OnGroup | None = None
    ) -> list[list[Completion]]:
        """See `RolloutEngine.generate`.

        Raises:
            UserError: if a server refuses a request or sends a malformed reply.
            EngineLostError: if no server is left.
        """
        limit = max(1, self.config.concurrency // sampling.samples)
        groups: list[asyncio.Task[list[Completion]]] = []
        enough = False

        async def run_group(index: int, endpoint: Endpoint) -> list[Completion]:
            nonlocal enough
            completions = await self._generate_group(requests[index], sampling, endpoint, limit)
            if on_group is not None and not enough and await on_group(index, completions):
                enough = True
                for other in groups:
                    if other is not asyncio.current_task():
                        other.cancel()  # this closes its connection, and the server aborts the request
            return completions

        try:
            async with asyncio.TaskGroup() as tasks:
                watches = [tasks.create_task(self._watch(endpoint)) for endpoint in self.endpoints]
                for index in range(len(requests)):
                    # Prompts are assigned one by one when a server has capacity, so a fast server gets more of them.
                    endpoint = await self._claim_endpoint(limit)
                    if enough:
                        break
                    groups.append(tasks.create_task(run_group(index, endpoint)))
                if groups:
                    await asyncio.wait(groups)
                for watch in watches:
                    watch.cancel()
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None
        completed = [[] if task.cancelled() else task.result() for task in groups]
        return completed + [[] for _ in requests[len(completed) :]]

    async def _generate_group(
        self, request: GroupRequest, sampling: SamplingSettings, endpoint: Endpoint, limit: int
    ) -> list[Completion]:
        """Request all samples of a prompt from one server, whose prefix cache then holds the prompt for all of them."""
        body = generate_body(request.prompt, sampling, request.seeds)
        prefill = prefill_body(request.prompt) if self._prefills_once(request, sampling) else None
        losses: list[str] = []
        while True:
            try:
                if prefill is not None:
                    await endpoint.generate(prefill, LARGEST_REPLY)  # if it is refused, so are the samples
                return await self._request_group(endpoint, body, sampling, len(request.prompt))
            except ServerLostError as error:
                losses.append(str(error))
            finally:
                endpoint.prompts_in_flight -= 1
                self._capacity_changed.set()
            if len(losses) >= self.config.attempts:
                raise UserError(
                    f"{len(losses)} SGLang servers were lost under one prompt (rollout.sglang.attempts); "
                    f"the last error: {losses[-1]}"
                )
            endpoint = await self._claim_endpoint(limit)

    def _prefills_once(self, request: GroupRequest, sampling: SamplingSettings) -> bool:
        shortest, server = self.config.prefill_once_from, normalized(self.config.server)
        is_long = shortest > 0 and len(request.prompt) >= shortest
        return is_long and sampling.samples > 1 and not server.get("disable_radix_cache")

    async def _request_group(
        self, endpoint: Endpoint, body: bytes, sampling: SamplingSettings, prompt_tokens: int
    ) -> list[Completion]:
        reply = await endpoint.generate(body, largest_reply(sampling, prompt_tokens))
        completions = read_completions(endpoint.url, reply, sampling, prompt_tokens)
        if completions is None:
            raise endpoint.mark_lost("it aborted a request")
        for completion in completions:
            if not self.state.accepts(completion):
                spans = " then ".join(str(version) for version, _ in completion.version_spans)
                used = spans or completion.weight_version
                raise endpoint.mark_lost(f"it answered with weights {used} instead of {self.state.expected_version}")
        return completions

    async def _claim_endpoint(self, limit: int) -> Endpoint:
        """Wait for a server that is up and has fewer than `limit` prompts in flight, and count one more there.

        Chooses the server with the fewest prompts in flight.

        Raises:
            EngineLostError: if no server is up and none will come back.
        """
        clock = asyncio.get_running_loop().time
        deadline = clock() + self.config.start_timeout_seconds
        warned = False
        while True:
            self._capacity_changed.clear()
            alive = [e for e in self.endpoints if e.up]
            if alive:
                deadline = clock() + self.config.start_timeout_seconds
                idlest = min(alive, key=lambda e: e.prompts_in_flight)
                if idlest.prompts_in_flight < limit:
                    idlest.prompts_in_flight += 1
                    return idlest
            elif reason := self.unavailable():
                raise EngineLostError(f"no SGLang server is left: {reason}")
            elif clock() > deadline:
                if self.config.when_all_lost == "stop":
                    raise EngineLostError(f"no SGLang server is left: {self._reasons()}")
                if not warned:
                    print(f"warning: no SGLang server is left, waiting for one: {self._reasons()}", file=sys.stderr)
                    warned = True
            await _wait_for_event(self._capacity_changed)

    def _reasons(self) -> str:
        return "; ".join(f"{e.url}: {e.why_down}" for e in self.endpoints if not e.up)

    async def _watch(self, endpoint: Endpoint) -> None:
        while True:
            endpoint.probe_now.clear()
            try:
                if self.state.updating:  # a server that loads weights, or is paused for an update, need not answer
                    pass
                elif endpoint.up:
                    await endpoint.check_health()
                else:
                    await self.prepare(endpoint)
            except ServerLostError as error:
                if not self.state.updating:
                    endpoint.mark_lost(str(error))
                    endpoint.probe_now.clear()
            else:
                if not endpoint.up and not self.state.updating:
                    endpoint.up = True
                    self._capacity_changed.set()
            await _wait_for_event(endpoint.probe_now)

    async def prepare(self, endpoint: Endpoint) -> None:
        """Check that a server answers, and load the expected weights on it if it holds others.

        Raises:
            ServerLostError: if it cannot be used yet.
            UserError: if it refuses the weights.
        """
        # A new server is not checked, because a health check takes SGLang a second and `_watch` runs one soon anyway.
        if endpoint.was_lost:
            if self.state.max_staleness:  # it may have been lost while it was paused for an update
                await endpoint.command("/continue_generation", {}, "continue generation")
            await endpoint.check_health()
        if await endpoint.weight_version() != str(self.state.expected_version):
            try:
                await endpoint.load_folder(self.state)
            except UserError as error:
                if not self.state.node_local:
                    raise
                # Its node may have replaced the folder meanwhile, which this process cannot see.
                raise ServerLostError(str(error)) from error


async def _wait_for_event(event: asyncio.Event) -> None:
    """Wait for the event, at most for one probe period."""
    # Not asyncio.wait_for: in Python 3.11 it swallows a cancellation that arrives together with the event.
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_PROBE_PERIOD_S):
            await event.wait()
