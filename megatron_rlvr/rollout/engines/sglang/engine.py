"""The rollout engine on SGLang servers: token ids go out over HTTP, token ids with log-probs come back."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, nullcontext, suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_rlvr.config import Config
from megatron_rlvr.data.completion import Completion
from megatron_rlvr.errors import UserError
from megatron_rlvr.megatron import collectives
from megatron_rlvr.rollout.engines.base import Finished, SamplingPolicy
from megatron_rlvr.rollout.engines.sglang.client import Client
from megatron_rlvr.rollout.engines.sglang.endpoint import Endpoint, ServerLostError, Weights
from megatron_rlvr.rollout.engines.sglang.folders import WeightFolders
from megatron_rlvr.rollout.engines.sglang.identity import check_model
from megatron_rlvr.rollout.engines.sglang.server import ServerPool
from megatron_rlvr.rollout.engines.sglang.transfer import BroadcastTransfer, Receiver, SharedMemoryTransfer, Transfer
from megatron_rlvr.rollout.engines.sglang.weights import load_everywhere, stream_everywhere
from megatron_rlvr.training.policy import Policy
from megatron_rlvr.weights.buckets import buckets


class SGLangEngine:
    """Generates on SGLang servers, which the main process starts, or which run elsewhere.

    Every data-parallel rank's leader is a client of all servers. Construction is collective over the job.

    Args:
        config: of the run.
        policy: whose weights the servers get.
        resources: stops the servers when it is closed.

    Raises:
        UserError: when a server does not start or cannot be reached, or has another model.
    """

    collective = False

    def __init__(self, config: Config, policy: Policy, resources: ExitStack):
        self.config, self.policy = config.rollout.sglang, policy
        self.layout = policy.layout
        directory = Path(config.run_directory).resolve() / "sglang"
        self.context_length = policy.bridge.context_length
        self.folders = WeightFolders(directory / "weights", policy.bridge, self._published)
        base = policy.bridge.path.resolve()
        self.weights = Weights(0, base, staleness=config.rollout.max_staleness)
        self.failure: str | None = None  # why no server can be used until the next update
        self.problem: str | None = None  # what the user must mend before any server can be used
        self.under_way = 0
        self._settled = threading.Condition()
        self._offloaded = False
        self._probes_paused = ExitStack()
        self.pool: ServerPool | None = None
        urls = list(self.config.urls)
        if not urls:
            if self.layout.is_main:
                self._check_host()
                dtype = str(policy.bridge.dtype).removeprefix("torch.")
                self.pool = resources.enter_context(ServerPool(self.config, base, dtype, directory / "logs"))
            urls = collectives.broadcast_from_main(self.pool.urls if self.pool else None)
        self.urls = urls
        way = self.config.weight_sync
        if way == "auto":
            way = "disk" if self.config.urls else "tensor"
        self.transfer: Transfer | None = None
        if way == "distributed":
            self.transfer = BroadcastTransfer(self.config.update_timeout_seconds)
        elif way == "tensor":
            self.transfer = SharedMemoryTransfer()
        if self.transfer is not None:
            resources.callback(self.transfer.close)
        if self.config.urls:  # who knows what weights they hold
            if self.layout.is_main:
                with asyncio.Runner() as runner:
                    lost = self._load(runner, [Endpoint(url, self.config) for url in self.urls], flush=True)
                if len(lost) == len(self.urls):
                    raise UserError(f"no server of rollout.sglang.urls can be used: {'; '.join(lost)}")
            collectives.barrier()

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingPolicy,
        seeds: Sequence[int],
        finished: Finished | None = None,
    ) -> list[Completion]:
        """See `StreamingEngine.generate`; the same seed draws the same completion only on a deterministic server."""
        if self.problem:
            raise UserError(self.problem)
        longest = max(len(prompt) for prompt in prompts)
        if longest + sampling.max_tokens > self.context_length:
            raise UserError(
                f"a prompt of {longest} tokens and rollout.max_tokens={sampling.max_tokens} are more than the model's "
                f"context of {self.context_length} tokens: lower rollout.max_tokens or data.max_prompt_tokens"
            )

        async def ask() -> list[Completion]:
            async with Client(self.urls, self.config, self.weights, self._failure) as client:
                return await client.generate(prompts, sampling, seeds, finished)

        with self._settled:
            self.under_way += 1
        try:
            return asyncio.run(ask())
        finally:
            with self._settled:
                self.under_way -= 1
                self._settled.notify_all()

    def offload(self) -> None:
        """See `RolloutEngine.offload`: servers release their memory under ``rollout.sglang.release_memory``."""
        if self.config.release_memory:
            collectives.barrier()  # until every rank has its rollout
            self._offloaded = True
            if self.layout.is_main:
                if self.pool:
                    self._probes_paused.enter_context(self.pool.changing_weights())
                with asyncio.Runner() as runner:
                    self._tell(runner, "/release_memory_occupation", {}, "release its memory")

    def update_weights(self, version: int) -> None:
        """See `RolloutEngine.update_weights`: the way is that of ``rollout.sglang.weight_sync``.

        With ``rollout.max_staleness`` completions may be under way, which ``rollout.sglang.interrupt`` decides on.
        """
        main = self.layout.is_main
        if self.config.interrupt == "finish":
            with self._settled:
                self._settled.wait_for(lambda: self.under_way == 0)
        folder = self.folders.folder(version)
        if main:
            self.folders.discard(version)  # of a run that came as far before it was killed
        if self.transfer is None:
            self.folders.write(self.policy, version)
        self.failure = self.problem = None
        self.weights.changing = True
        self.weights.version = version
        self.weights.folder = folder if self.transfer is None or self.config.recovery_copy else None
        if self.weights.staleness:
            collectives.barrier()  # until no rank takes a silent server for a hung one
        tensors = iter(()) if self.transfer is None else self.policy.bridge.export(self.policy.model_chunks)
        if main:
            try:
                with self.pool.changing_weights() if self.pool else nullcontext(), asyncio.Runner() as runner:
                    self._give(runner, version, tensors)
            except UserError as error:  # raised by the next `generate`, when the step is recorded
                self.problem = str(error)
        for _ in tensors:  # the export is collective, whatever the servers say
            pass
        self.failure, self.problem = collectives.broadcast_from_main((self.failure, self.problem) if main else None)
        self.weights.changing = False

    def _failure(self) -> str | None:
        return self.failure or (self.pool.failure if self.pool else None)

    def _give(self, runner: asyncio.Runner, version: int, tensors: Iterator[tuple[str, Tensor]]) -> None:
        """Give all servers the weights; on the main process, between what must stand before and after."""
        endpoints = [Endpoint(url, self.config) for url in self.urls]
        interrupted = self.weights.staleness > 0 and self.config.interrupt != "finish"
        flush = not interrupted or self.config.interrupt == "retract"  # a cache in use cannot be dropped
        if self._offloaded:
            self._tell(runner, "/resume_memory_occupation", {"tags": ["weights"]}, "resume its memory")
        if interrupted:
            self._tell(runner, "/pause_generation", {"mode": self.config.interrupt}, "pause")
        try:
            if self.transfer is None:
                self._load(runner, endpoints, flush)
            else:
                self._stream(runner, endpoints, self.transfer, version, flush, tensors)
        finally:
            if interrupted:
                self._tell(runner, "/continue_generation", {}, "go on")
        if self._offloaded:
            self._tell(runner, "/resume_memory_occupation", {"tags": ["kv_cache", "cuda_graph"]}, "resume its memory")
            self._probes_paused.close()
            self._offloaded = False

    def _tell(self, runner: asyncio.Runner, path: str, body: dict[str, Any], what: str) -> None:
        """Order every server something; one that is lost is none the worse for missing it."""

        async def tell(endpoint: Endpoint) -> None:
            with suppress(ServerLostError):
                await endpoint.order(path, body, what)

        async def tell_all() -> None:
            await asyncio.gather(*[tell(Endpoint(url, self.config)) for url in self.urls])

        runner.run(tell_all())

    def _stream(
        self,
        runner: asyncio.Runner,
        endpoints: list[Endpoint],
        transfer: Transfer,
        version: int,
        flush: bool,
        tensors: Iterator[tuple[str, Tensor]],
    ) -> None:
        """Give all servers the weights from memory; those that cannot take them that way, from the copy on disk."""
        receivers = runner.run(self._receivers(endpoints))
        stream = buckets(tensors, self.config.bucket_mb * 2**20, transfer.allocate)
        if self.config.recovery_copy:
            stream = self.folders.copying(stream, version)
        checked = self.config.check_weights
        failure = stream_everywhere(runner, receivers, transfer, stream, version, flush, checked)
        if failure is None and len(receivers) == len(endpoints):
            return
        took = [receiver.endpoint for receiver in receivers] if failure is None else []
        others = [endpoint for endpoint in endpoints if endpoint not in took]
        reason = failure or "a server does not answer"
        if not self.config.recovery_copy:
            self.failure = None if took else f"none took the weights of step {version} ({reason})"
            return
        print(f"warning: weights of step {version} go through the disk this time: {reason}", file=sys.stderr)
        self.folders.wait()
        self._load(runner, others, flush)

    async def _receivers(self, endpoints: list[Endpoint]) -> list[Receiver]:
        """The servers that answer, all with the trained model, and over how many ranks each spreads it."""
        starts = [server.starts for server in self.pool.servers] if self.pool else [0] * len(endpoints)

        async def ask(endpoint: Endpoint, times: int) -> Receiver | None:
            try:
                check_model(endpoint.url, await endpoint.model_info(), self.policy.bridge.hf_config)
                return Receiver(endpoint, await endpoint.tensor_parallel_size(), times)
            except ServerLostError:
                return None

        found = await asyncio.gather(*[ask(e, n) for e, n in zip(endpoints, starts, strict=True)])
        return [receiver for receiver in found if receiver is not None]

    def _load(self, runner: asyncio.Runner, endpoints: list[Endpoint], flush: bool) -> list[str]:
        """Give servers the current weights from their folder; returns why those did not take them that do not answer.

        They are given them when they are back.
        """
        return runner.run(load_everywhere(endpoints, self.weights, self.policy.bridge.hf_config, flush))

    def _published(self, folder: Path, version: int) -> set[Path]:
        """A folder is complete: servers are started with it from now on; returns those that some are starting with."""
        if self.pool is None:
            return set()
        self.pool.weights = (folder, version)
        return self.pool.folders_in_use()

    def _check_host(self) -> None:
        machines = int(os.environ.get("WORLD_SIZE", "1")) > int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        if "LOCAL_WORLD_SIZE" in os.environ and machines and "host" not in self.config.server:
            raise UserError(
                "the job spans several machines, whose processes cannot reach a server at 127.0.0.1: set "
                "rollout.sglang.server.host to 0.0.0.0, or give rollout.sglang.urls"
            )
