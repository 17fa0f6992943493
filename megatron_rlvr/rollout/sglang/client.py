"""The asynchronous client of one or several SGLang servers: every request is answered once, whichever server dies."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from megatron_rlvr.config import SGLangConfig
from megatron_rlvr.errors import UserError
from megatron_rlvr.rollout.engine import Completion, SamplingPolicy

_PROBE_PERIOD_S = 1.0
_CONNECT_TIMEOUT_S = 5.0
UNKNOWN_VERSION = -1


class ServerLostError(Exception):
    """A server died, hung, or holds other weights than it should: whatever it was asked must be asked elsewhere."""


@dataclass
class Endpoint:
    """One server as its client sees it."""

    url: str
    slots: asyncio.Semaphore
    up: bool = False
    why_down: str = "it was not asked yet"
    open: set[asyncio.Task[Any]] = field(default_factory=set)
    groups: int = 0
    probe_now: asyncio.Event = field(default_factory=asyncio.Event)

    def lose(self, why: str) -> None:
        """Stop using it: what it has not answered yet goes elsewhere."""
        self.up, self.why_down = False, why
        for task in self.open:
            task.cancel()
        self.probe_now.set()


@dataclass
class _Home:
    """The server that the samples of one prompt go to."""

    endpoint: Endpoint | None = None

    def move(self, to: Endpoint | None) -> None:
        if self.endpoint is not None:
            self.endpoint.groups -= 1
        self.endpoint = to
        if to is not None:
            to.groups += 1


@dataclass
class Weights:
    """The weights that servers must hold, and the folder from which one that does not is given them."""

    version: int
    folder: Path


class Client:
    """Talks to the servers behind `urls`, within one running event loop.

    A watch on each server probes it all the time, so that one that hangs without closing its connections is found
    a few seconds after ``health_timeout_seconds``; its open requests are cancelled and asked elsewhere, or again when
    it is back.

    Args:
        urls: of the servers.
        config: limits and timeouts.
        weights: what a server must hold before it is asked anything.
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
        self.endpoints = [Endpoint(url.rstrip("/"), asyncio.Semaphore(config.concurrency)) for url in urls]
        timeout = httpx.Timeout(config.request_timeout_seconds, connect=_CONNECT_TIMEOUT_S)
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        encrypted = any(url.startswith("https:") for url in urls)  # else spare each rollout the loading of certificates
        self.http = httpx.AsyncClient(timeout=timeout, limits=limits, trust_env=False, verify=encrypted)
        self._room = asyncio.Event()

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.http.aclose()

    # Samples of one prompt ------------------------------------------------------------------------------------------

    async def generate(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingPolicy, seeds: Sequence[int]
    ) -> list[Completion]:
        """See `RolloutEngine.generate`.

        Raises:
            UserError: when a server refuses a request or answers nonsense, or no server is left.
        """
        count = sampling.samples
        try:
            async with asyncio.TaskGroup() as tasks:
                watches = [tasks.create_task(self._watch(endpoint)) for endpoint in self.endpoints]
                groups = []
                for g, prompt in enumerate(prompts):
                    # One prompt after the other as servers have room, so that a quick or a new server gets more.
                    home = _Home()
                    home.move(await self._idlest(groups_at_most=math.ceil(self.config.concurrency / count)))
                    mine = seeds[g * count : (g + 1) * count]
                    groups.append(tasks.create_task(self._group(list(prompt), sampling, mine, home)))
                completions = await asyncio.gather(*groups)
                for watch in watches:
                    watch.cancel()
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None
        return [completion for group in completions for completion in group]

    async def _group(
        self, prompt: list[int], sampling: SamplingPolicy, seeds: Sequence[int], home: _Home
    ) -> list[Completion]:
        """The samples of one prompt: all at one server, which then computes the prompt once."""
        try:
            return list(await asyncio.gather(*[self._sample(prompt, sampling, seed, home) for seed in seeds]))
        finally:
            home.move(None)
            self._room.set()

    async def _sample(self, prompt: list[int], sampling: SamplingPolicy, seed: int, home: _Home) -> Completion:
        lost: list[str] = []
        while len(lost) < self.config.attempts:
            endpoint = home.endpoint
            if endpoint is None or not endpoint.up:
                idlest = await self._idlest()
                if home.endpoint is endpoint:  # else another sample of the group moved it meanwhile
                    home.move(idlest)
                continue
            async with endpoint.slots:
                if not endpoint.up:
                    continue
                try:
                    return await self._ask(endpoint, prompt, sampling, seed)
                except ServerLostError as error:
                    lost.append(str(error))
        raise UserError(
            f"{len(lost)} SGLang servers were lost under one completion (rollout.sglang.attempts); the last: {lost[-1]}"
        )

    async def _ask(self, endpoint: Endpoint, prompt: list[int], sampling: SamplingPolicy, seed: int) -> Completion:
        body = {"input_ids": prompt, "sampling_params": sampling_parameters(sampling, seed), "return_logprob": True}
        request = asyncio.create_task(self.http.post(f"{endpoint.url}/generate", json=body))
        endpoint.open.add(request)
        try:
            await asyncio.wait([request])
        finally:
            endpoint.open.discard(request)
            if not request.done():
                request.cancel()
        if request.cancelled():
            raise ServerLostError(f"{endpoint.url}: {endpoint.why_down}")
        error = request.exception()
        if isinstance(error, httpx.ReadTimeout):
            why = f"no answer within rollout.sglang.request_timeout_seconds={self.config.request_timeout_seconds:g}"
            raise ServerLostError(f"{endpoint.url}: {why}")
        if isinstance(error, httpx.HTTPError):
            endpoint.lose(_describe(error))
            raise ServerLostError(f"{endpoint.url}: {endpoint.why_down}")
        if error is not None:
            raise error
        reply = request.result()
        if reply.status_code >= 500:
            endpoint.lose(f"status {reply.status_code}")
            raise ServerLostError(f"{endpoint.url}: {endpoint.why_down}")
        completion = read_completion(endpoint.url, reply, sampling)
        if completion is None:
            endpoint.lose("it aborted a request")
            raise ServerLostError(f"{endpoint.url}: {endpoint.why_down}")
        if completion.weight_version != self.weights.version:
            endpoint.lose(f"it answered with weights {completion.weight_version} instead of {self.weights.version}")
            raise ServerLostError(f"{endpoint.url}: {endpoint.why_down}")
        return completion

    # Which servers there are ----------------------------------------------------------------------------------------

    async def _idlest(self, groups_at_most: float = math.inf) -> Endpoint:
        """The living server with the fewest prompts, at most so many; waits for one when there is none."""
        clock = asyncio.get_running_loop().time
        deadline = clock() + self.config.start_timeout_seconds
        while True:
            self._room.clear()
            alive = [e for e in self.endpoints if e.up]
            if alive:
                deadline = clock() + self.config.start_timeout_seconds
                idlest = min(alive, key=lambda e: e.groups)
                if idlest.groups <= groups_at_most:
                    return idlest
            elif (reason := self.failure()) or clock() > deadline:
                raise UserError(f"no SGLang server is left: {reason or self._down()}")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._room.wait(), _PROBE_PERIOD_S)

    def _down(self) -> str:
        return "; ".join(f"{e.url}: {e.why_down}" for e in self.endpoints if not e.up)

    async def _watch(self, endpoint: Endpoint) -> None:
        while True:
            endpoint.probe_now.clear()
            try:
                if endpoint.up:
                    await self._check_health(endpoint)
                else:
                    await self.adopt(endpoint)
            except ServerLostError as error:
                endpoint.lose(str(error))
                endpoint.probe_now.clear()
            else:
                if not endpoint.up:
                    endpoint.up = True
                    self._room.set()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(endpoint.probe_now.wait(), _PROBE_PERIOD_S)

    async def _check_health(self, endpoint: Endpoint) -> None:
        reply = await self._call("GET", endpoint, "/health_generate", self.config.health_timeout_seconds)
        if reply.status_code != 200:
            raise ServerLostError(f"health check: status {reply.status_code}")

    # Weights --------------------------------------------------------------------------------------------------------

    async def adopt(self, endpoint: Endpoint) -> None:
        """Make sure that a server answers and holds the current weights; give them to it where it does not."""
        await self._check_health(endpoint)
        if await self.weight_version(endpoint) != str(self.weights.version):
            await self.load_weights(endpoint)

    async def weight_version(self, endpoint: Endpoint) -> str:
        return str((await self.model_info(endpoint)).get("weight_version"))

    async def model_info(self, endpoint: Endpoint) -> dict[str, Any]:
        reply = await self._call("GET", endpoint, "/model_info", self.config.health_timeout_seconds)
        try:
            info = reply.json()
        except ValueError:
            info = None
        if reply.status_code != 200 or not isinstance(info, dict) or "weight_version" not in info:
            raise UserError(f"{endpoint.url} is no SGLang server: /model_info answered {_excerpt(reply)}")
        return info

    async def load_weights(self, endpoint: Endpoint) -> None:
        """Have a server load the current weights from their folder, and read the version back.

        Raises:
            ServerLostError: when it does not answer.
            UserError: when it refuses them, or names another version afterwards.
        """
        body = {
            "model_path": str(self.weights.folder),
            "weight_version": str(self.weights.version),
            "flush_cache": True,
        }
        path, timeout = "/update_weights_from_disk", self.config.update_timeout_seconds
        reply = await self._call("POST", endpoint, path, timeout, body)
        if reply.status_code >= 500:
            raise ServerLostError(f"{path}: status {reply.status_code}")
        try:
            succeeded = reply.status_code == 200 and reply.json()["success"] is True
        except (ValueError, KeyError, TypeError):
            succeeded = False
        if not succeeded:
            raise UserError(
                f"{endpoint.url} did not take the weights in {self.weights.folder} (another model behind it, or a "
                f"folder that it does not see): it answered {_excerpt(reply)}"
            )
        found = await self.weight_version(endpoint)
        if found != str(self.weights.version):
            raise UserError(
                f"{endpoint.url} serves weights of version {found} after it was given {self.weights.version}: "
                "does another run use this server?"
            )

    async def _call(
        self, method: str, endpoint: Endpoint, path: str, timeout: float, body: Any = None
    ) -> httpx.Response:
        limit = httpx.Timeout(timeout, connect=_CONNECT_TIMEOUT_S)
        try:
            return await self.http.request(method, endpoint.url + path, json=body, timeout=limit)
        except httpx.HTTPError as error:
            raise ServerLostError(f"{path}: {_describe(error)}") from error


def sampling_parameters(sampling: SamplingPolicy, seed: int) -> dict[str, Any]:
    """A `SamplingPolicy` in SGLang's words. The seed acts only on servers with ``enable_deterministic_inference``."""
    parameters: dict[str, Any] = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k or -1,
        "max_new_tokens": sampling.max_tokens,
        "sampling_seed": seed & 0x7FFFFFFF,
        "skip_special_tokens": False,
    }
    if sampling.stop_token_ids:
        parameters["stop_token_ids"] = list(sampling.stop_token_ids)
    else:
        parameters["ignore_eos"] = True
    return parameters


def read_completion(url: str, reply: httpx.Response, sampling: SamplingPolicy) -> Completion | None:
    """The completion in a reply of ``/generate``; None when the server aborted it.

    Raises:
        UserError: when the server refused the request, or the reply has not the form it should.
    """
    if reply.status_code != 200:
        raise UserError(f"{url} refused a prompt with status {reply.status_code}: {_excerpt(reply)}")
    try:
        content = reply.json()
        meta = content["meta_info"]
        reason = meta["finish_reason"]["type"]
        if reason == "abort":
            return None
        tokens = [int(token) for token in content["output_ids"]]
        scored = [(float(entry[0]), int(entry[1])) for entry in meta["output_token_logprobs"]]
        version = str(meta["weight_version"])
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(
            f"{url} sent a malformed reply ({type(error).__name__}: {error}): {_excerpt(reply)}; is it SGLang, and of "
            "the version that docs/sglang.md names?"
        ) from error
    if not 0 < len(tokens) <= sampling.max_tokens or [token for _, token in scored] != tokens:
        raise UserError(f"{url} sent {len(tokens)} tokens with log-probs of {len(scored)} (or of other tokens)")
    if reason not in ("stop", "length") or any(not math.isfinite(logprob) for logprob, _ in scored):
        raise UserError(f"{url} sent a log-prob that is no number, or the unknown finish reason {reason!r}")
    # A server that was started by hand calls its weights "default".
    number = int(version) if version.isdecimal() else UNKNOWN_VERSION
    return Completion(tokens, [logprob for logprob, _ in scored], reason, number)


def _describe(error: httpx.HTTPError) -> str:
    return f"{type(error).__name__} {error}".strip()


def _excerpt(reply: httpx.Response) -> str:
    return " ".join(reply.text[:300].split()) or f"nothing (status {reply.status_code})"
