"""Keep the policy's weights on all servers: choose the transport, and handle servers that fail during an update."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from megatron_rlvr.errors import UserError
from megatron_rlvr.megatron import device, waiting
from megatron_rlvr.rollout.engines.sglang.config import SGLangConfig
from megatron_rlvr.rollout.engines.sglang.endpoint import Endpoint, ServerLostError
from megatron_rlvr.rollout.engines.sglang.server_control import ServerControl
from megatron_rlvr.rollout.engines.sglang.server_pool import ServerPool
from megatron_rlvr.rollout.engines.sglang.server_state import ServerState
from megatron_rlvr.rollout.engines.sglang.weight_sync.broadcast import BroadcastTransport
from megatron_rlvr.rollout.engines.sglang.weight_sync.checks import check_model
from megatron_rlvr.rollout.engines.sglang.weight_sync.delta_folders import DeltaFolders
from megatron_rlvr.rollout.engines.sglang.weight_sync.folders import WeightFolders
from megatron_rlvr.rollout.engines.sglang.weight_sync.placement import (
    RankPlace,
    ServerPlace,
    check_broadcast,
    own_nccl_version,
    suppliers,
)
from megatron_rlvr.rollout.engines.sglang.weight_sync.shared_memory import SharedMemoryTransport, Supply
from megatron_rlvr.rollout.engines.sglang.weight_sync.transport import Receiver, Transport
from megatron_rlvr.rollout.engines.sglang.weight_sync.update import load_on_servers, stream_to_servers
from megatron_rlvr.training.policy import Policy
from megatron_rlvr.weights import fp8
from megatron_rlvr.weights.buckets import Bucket, filled, largest_bytes, plan_buckets


@dataclass(frozen=True)
class UpdateOutcome:
    """Whether the next rollout can generate after an update of the servers' weights.

    Attributes:
        unavailable: why no server can generate until the next update; None if a server can.
        user_error: error that the user must correct before any server can generate; None if there is none.
        without_folder: see `ServerState`.
    """

    unavailable: str | None = None
    user_error: str | None = None
    without_folder: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Delivery:
    """What one process did in an update.

    Attributes:
        updated: URLs of the servers that it updated.
        failure: why it could not update its servers, if the copy on disk can help.
        user_error: error that the user must correct.
    """

    updated: Sequence[str] = ()
    failure: str | None = None
    user_error: str | None = None


class WeightSync:
    """Sends the policy's weights to all servers after every step.

    Args:
        config: section ``rollout.sglang``, with ``auto`` resolved.
        policy: the policy whose weights the servers receive.
        places: where the servers run; their URLs.
        server_ranks: number of ranks of each server.
        state: the weights that servers should hold; updated by `publish`.
        root: folder in which the weights of each version get a folder.
        pool: the servers that the main process started, None for others. Restarted servers load the newest folder.
        quantize: whether the servers hold the weights in FP8 (`weights.fp8`).

    Attributes:
        transport: sends buckets to running servers; None if servers load a folder (``disk``, ``delta``).
        deltas: for ``delta``, the folders that servers load; None otherwise.
    """

    def __init__(
        self,
        config: SGLangConfig,
        policy: Policy,
        places: Sequence[ServerPlace],
        server_ranks: Sequence[int],
        state: ServerState,
        root: Path,
        pool: ServerPool | None = None,
        quantize: bool = False,
    ):
        self.config, self.policy, self.state, self.pool = config, policy, state, pool
        self.urls = [place.url for place in places]
        self.control = ServerControl(self.urls, config, state.key)
        quantization = fp8.QUANTIZATION_CONFIG if quantize else None
        self.folders = WeightFolders(root, policy.bridge, self._folder_complete, quantization)
        self.deltas: DeltaFolders | None = None
        self.transport: Transport | None = None
        export = policy.bridge.weight_export(policy.model_chunks)
        self._export: fp8.Export = fp8.QuantizedExport(export) if quantize else export
        self._sends_to: list[str] = []
        rank = policy.layout.rank
        if config.weight_sync == "distributed":
            if policy.layout.is_main:
                check_broadcast(places, RankPlace.of_this_process(), own_nccl_version())
                self._sends_to = self.urls
            self.transport = BroadcastTransport(config.update_timeout_seconds, holds_buckets=policy.layout.is_main)
        elif config.weight_sync == "tensor":
            processes = waiting.all_gather_over_job(RankPlace.of_this_process(), "every process to report its node")
            supplies = []
            for place, ranks in zip(places, server_ranks, strict=True):
                by_rank = suppliers(place, ranks, processes)
                supplies.append(Supply(place.url, by_rank, waiting.new_group(sorted(set(by_rank)), "suppliers")))
            self._sends_to = [supply.url for supply in supplies if supply.sender == rank]
            self.transport = SharedMemoryTransport(supplies, rank)
        elif config.weight_sync == "delta":
            is_main = policy.layout.is_main
            self.deltas = DeltaFolders(
                config, root, policy.bridge, places, state.key, self._folder_complete, quantization, is_main
            )
            state.node_local = True

    def close(self) -> None:
        """Release the resources of the transport at the end of the run."""
        if self.deltas is not None:
            self.deltas.close()
        if self.transport is not None:
            self.transport.close()

    def load_first_weights(self) -> None:
        """Load the expected weights on servers that the trainer did not start. Called by the main process.

        Raises:
            UserError: if none of the servers can be used, or one serves a different model.
        """
        with asyncio.Runner() as runner:
            lost = self._load(runner, self.control.endpoints(), flush_cache=True)
        if len(lost) == len(self.control.urls):
            raise UserError(
                f"no server of rollout.sglang.urls can be used: {'; '.join(lost)}: start them, or correct the URLs"
            )

    def publish(self, version: int, offloaded: bool = False) -> UpdateOutcome:
        """Send the policy's current weights to all servers. Collective over the job.

        Args:
            version: version of the weights.
            offloaded: whether servers have released their memory, and must resume it.

        Returns:
            the outcome, the same on every process.
        """
        is_main = self.policy.layout.is_main
        folders = self.deltas or self.folders
        if is_main and self.deltas is None:
            self.folders.discard(version)
        if self.transport is None:
            folders.write(self._export.tensors(), version, is_main=is_main)
            if is_main and self.deltas is not None:
                asyncio.run(self.deltas.deliver(version))
        self.state.updating = True
        self.state.expected_version = version
        has_folder = self.transport is None or self.config.recovery_copy
        self.state.folder = folders.folder(version) if has_folder else None
        if offloaded:  # the servers' memory comes from what the trainers on their GPUs return
            device.return_cached_memory()
        # Other ranks may still wait for completions in flight (`interrupt: finish`), and none may do so within a
        # collective of the export. After this, every rank also knows of the update, so none mistakes a server that
        # loads weights for a hung one.
        waiting.barrier(f"the start of the update of the servers to the weights of step {version}")
        if is_main and folders is self.folders and self.transport is None:
            # Not earlier: a process that still expects the previous version may have a server load its folder.
            self.folders.delete_older()
        pausing = self.state.max_staleness > 0 and self.config.interrupt != "finish"
        flush_cache = not pausing or self.config.interrupt == "retract"  # a cache in use cannot be flushed
        outcome = UpdateOutcome()
        unwatched = self.pool.without_health_checks() if self.pool else nullcontext()
        with unwatched, asyncio.Runner() as runner:
            problem = _user_error(lambda: self._prepare(runner, offloaded, pausing)) if is_main else None
            problem = waiting.broadcast_from_main(problem, "the servers to be ready for an update of the weights")
            deliveries = [] if problem or self.transport is None else self._stream(runner, version, flush_cache)
            if is_main:
                try:
                    if problem is not None:
                        raise UserError(problem)
                    outcome = self._complete(runner, version, deliveries, flush_cache)
                except UserError as error:
                    outcome = UpdateOutcome(user_error=str(error))
                finally:
                    if offloaded:
                        runner.run(self.control.resume_memory("kv_cache", "cuda_graph"))
                    if pausing or offloaded:  # `release_memory` paused them, too
                        runner.run(self.control.continue_generation())
        outcome = waiting.broadcast_from_main(
            outcome if is_main else None, f"the servers to load the weights of step {version}"
        )
        self.state.without_folder = outcome.without_folder
        self.state.updating = False
        return outcome

    def _prepare(self, runner: asyncio.Runner, offloaded: bool, pausing: bool) -> None:
        """Let all servers resume their memory and pause generation, as needed. Called by the main process."""
        if offloaded:
            runner.run(self.control.resume_memory("weights"))
        if pausing:
            runner.run(self.control.pause_generation())

    def _stream(self, runner: asyncio.Runner, version: int, flush_cache: bool) -> list[Delivery]:
        """Send the weights from memory to all servers. Collective over the job.

        Each server receives them from the processes of `placement`, one of which talks to it. Processes wait for
        servers between two buckets, outside the collectives of the export.

        Returns:
            what every process delivered, by rank.
        """
        transport, is_main = self.transport, self.policy.layout.is_main
        assert transport is not None
        planned = plan_buckets(self._export.described(), (self.config.bucket_mb or 1) * 2**20)
        copies = is_main and self.config.recovery_copy
        receivers: list[Receiver] = []
        buffers: list[Tensor] = []

        def get_ready() -> None:
            nonlocal receivers, buffers
            if copies:
                self.folders.wait()
            endpoints = [e for e in self.control.endpoints() if e.url in self._sends_to]
            receivers = runner.run(self._find_receivers(endpoints)) if endpoints else []
            if transport.holds_buckets or copies:
                buffers = [transport.allocate(largest_bytes(planned)) for _ in range(2)]

        problem = _user_error(get_ready)
        problems = waiting.all_gather_over_job(problem, "every process to be ready to send weights")
        if any(problems):  # none enters the export, which is collective
            return [Delivery(user_error=text) for text in problems]
        between = f"the servers to load a bucket of the weights of step {version}"
        stream: Iterator[Bucket] = filled(
            planned, self._export.tensors(), buffers, before_each=lambda: waiting.barrier(between)
        )
        if transport.holds_buckets:
            stream = _shared(stream, transport)
        if copies:
            stream = self.folders.copying(stream, version)
        delivery = Delivery()
        if self._sends_to:
            try:
                failure = stream_to_servers(
                    runner, receivers, transport, stream, version, flush_cache, self.config.check_weights
                )
                updated = [receiver.endpoint.url for receiver in receivers] if failure is None else []
                delivery = Delivery(updated, failure)
            except UserError as error:
                delivery = Delivery(user_error=str(error))
        for _ in stream:  # the export is collective, so every rank must finish it even if the servers failed
            pass
        return waiting.all_gather_over_job(delivery, f"the servers to load the weights of step {version}")

    def _complete(
        self, runner: asyncio.Runner, version: int, deliveries: Sequence[Delivery], flush_cache: bool
    ) -> UpdateOutcome:
        """Let servers that have not received the weights load them from their folder. Called by the main process."""
        endpoints = self.control.endpoints()
        if self.transport is None:
            without = self.deltas.without_weights if self.deltas else frozenset()
            self._load(runner, [endpoint for endpoint in endpoints if endpoint.url not in without], flush_cache)
            lost = f"no node has a copy of the weights of step {version}" if len(without) == len(endpoints) else None
            return UpdateOutcome(lost, without_folder=without)
        for delivery in deliveries:
            if delivery.user_error is not None:
                raise UserError(delivery.user_error)
        updated = {url for delivery in deliveries for url in delivery.updated}
        missing = [endpoint for endpoint in endpoints if endpoint.url not in updated]
        if not missing:
            return UpdateOutcome()
        reason = next((d.failure for d in deliveries if d.failure is not None), "a server does not answer")
        if not self.config.recovery_copy:
            return UpdateOutcome(None if updated else f"none received the weights of step {version} ({reason})")
        print(f"warning: weights of step {version} go through the disk this time: {reason}", file=sys.stderr)
        self.folders.wait()
        self._load(runner, missing, flush_cache)
        return UpdateOutcome()

    async def _find_receivers(self, endpoints: list[Endpoint]) -> list[Receiver]:
        """Return the servers that answer.

        Raises:
            UserError: if one of them serves a different model.
        """
        starts = {server.url: server.starts for server in self.pool.servers} if self.pool else {}

        async def ask(endpoint: Endpoint) -> Receiver | None:
            try:
                check_model(endpoint.url, await endpoint.model_info(), self.policy.bridge.hf_config)
                return Receiver(endpoint, await endpoint.tensor_parallel_size(), starts.get(endpoint.url, 0))
            except ServerLostError:
                return None

        answers = await asyncio.gather(*[ask(endpoint) for endpoint in endpoints])
        return [receiver for receiver in answers if receiver is not None]

    def _load(self, runner: asyncio.Runner, endpoints: list[Endpoint], flush_cache: bool) -> list[str]:
        """See `load_on_servers`."""
        return runner.run(load_on_servers(endpoints, self.state, self.policy.bridge.hf_config, flush_cache))

    def _folder_complete(self, folder: Path, version: int) -> set[Path]:
        """Let servers start from a new folder; returns the older folders that servers are still loading."""
        return self.pool.start_with(folder, version) if self.pool else set()


def _shared(stream: Iterable[Bucket], transport: Transport) -> Iterator[Bucket]:
    """Yield buckets that the transport has prepared."""
    for bucket in stream:
        transport.share(bucket)
        yield bucket


def _user_error(work: Callable[[], None]) -> str | None:
    """Do some work; returns the text of the UserError that it raised, or None."""
    try:
        work()
    except UserError as error:
        return str(error)
    return None
