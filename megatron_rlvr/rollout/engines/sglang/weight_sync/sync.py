"""Keep the policy's weights on all servers: choose the transport, and handle servers that fail during an update."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
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
from megatron_rlvr.rollout.engines.sglang.weight_sync.folders import WeightFolders
from megatron_rlvr.rollout.engines.sglang.weight_sync.shared_memory import SharedMemoryTransport
from megatron_rlvr.rollout.engines.sglang.weight_sync.transport import Receiver, Transport
from megatron_rlvr.rollout.engines.sglang.weight_sync.update import load_on_servers, stream_to_servers
from megatron_rlvr.training.policy import Policy
from megatron_rlvr.weights.buckets import buckets


@dataclass(frozen=True)
class UpdateOutcome:
    """Whether the next rollout can generate after an update of the servers' weights.

    Attributes:
        unavailable: why no server can generate until the next update; None if a server can.
        user_error: error that the user must correct before any server can generate; None if there is none.
    """

    unavailable: str | None = None
    user_error: str | None = None


class WeightSync:
    """Sends the policy's weights to all servers after every step.

    Args:
        config: section ``rollout.sglang``, with ``auto`` resolved.
        policy: the policy whose weights the servers receive.
        urls: URLs of the servers.
        state: the weights that servers should hold; updated by `publish`.
        root: folder in which the weights of each version get a folder.
        pool: the servers that the main process started, None for others. Restarted servers load the newest folder.

    Attributes:
        transport: sends buckets to running servers; None if servers load a folder (``disk``).
    """

    def __init__(
        self,
        config: SGLangConfig,
        policy: Policy,
        urls: list[str],
        state: ServerState,
        root: Path,
        pool: ServerPool | None = None,
    ):
        self.config, self.policy, self.state, self.pool = config, policy, state, pool
        self.control = ServerControl(urls, config, state.key)
        self.folders = WeightFolders(root, policy.bridge, self._folder_complete)
        self.transport: Transport | None = None
        if config.weight_sync == "distributed":
            self.transport = BroadcastTransport(config.update_timeout_seconds)
        elif config.weight_sync == "tensor":
            self.transport = SharedMemoryTransport()

    def close(self) -> None:
        """Release the resources of the transport at the end of the run."""
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
        if is_main:
            self.folders.discard(version)
        if self.transport is None:
            self.folders.write(self.policy, version)
        self.state.updating = True
        self.state.expected_version = version
        has_folder = self.transport is None or self.config.recovery_copy
        self.state.folder = self.folders.folder(version) if has_folder else None
        if offloaded:  # the servers' memory comes from what the trainers on their GPUs return
            device.return_cached_memory()
        # Other ranks may still wait for completions in flight (`interrupt: finish`), and none may do so within a
        # collective of the export. After this, every rank also knows of the update, so none mistakes a server that
        # loads weights for a hung one.
        waiting.barrier(f"the start of the update of the servers to the weights of step {version}")
        tensors = iter(()) if self.transport is None else self.policy.bridge.export(self.policy.model_chunks)
        outcome = UpdateOutcome()
        if is_main:
            try:
                with self.pool.without_health_checks() if self.pool else nullcontext(), asyncio.Runner() as runner:
                    outcome = self._update_servers(runner, version, tensors, offloaded)
            except UserError as error:
                outcome = UpdateOutcome(user_error=str(error))
        for _ in tensors:  # the export is collective, so every rank must finish it even if the servers failed
            pass
        outcome = waiting.broadcast_from_main(
            outcome if is_main else None, f"the servers to load the weights of step {version}"
        )
        self.state.updating = False
        return outcome

    def _update_servers(
        self, runner: asyncio.Runner, version: int, tensors: Iterator[tuple[str, Tensor]], offloaded: bool
    ) -> UpdateOutcome:
        """Update all servers from the main process, with generation paused and memory resumed as needed."""
        pausing = self.state.max_staleness > 0 and self.config.interrupt != "finish"
        flush_cache = not pausing or self.config.interrupt == "retract"  # a cache in use cannot be flushed
        if offloaded:
            runner.run(self.control.resume_memory("weights"))
        if pausing:
            runner.run(self.control.pause_generation())
        try:
            if self.transport is None:
                self._load(runner, self.control.endpoints(), flush_cache)
                outcome = UpdateOutcome()
            else:
                outcome = self._stream(runner, self.transport, version, flush_cache, tensors)
        finally:
            if pausing:
                runner.run(self.control.continue_generation())
        if offloaded:
            runner.run(self.control.resume_memory("kv_cache", "cuda_graph"))
            runner.run(self.control.continue_generation())  # `release_memory` paused it
        return outcome

    def _stream(
        self,
        runner: asyncio.Runner,
        transport: Transport,
        version: int,
        flush_cache: bool,
        tensors: Iterator[tuple[str, Tensor]],
    ) -> UpdateOutcome:
        """Send the weights from memory. Servers for which this fails load the copy on disk."""
        endpoints = self.control.endpoints()
        receivers = runner.run(self._find_receivers(endpoints))
        stream = buckets(tensors, self.config.bucket_mb * 2**20, transport.allocate)
        if self.config.recovery_copy:
            stream = self.folders.copying(stream, version)
        failure = stream_to_servers(
            runner, receivers, transport, stream, version, flush_cache, self.config.check_weights
        )
        if failure is None and len(receivers) == len(endpoints):
            return UpdateOutcome()
        updated = [receiver.endpoint for receiver in receivers] if failure is None else []
        reason = failure or "a server does not answer"
        if not self.config.recovery_copy:
            return UpdateOutcome(None if updated else f"none received the weights of step {version} ({reason})")
        print(f"warning: weights of step {version} go through the disk this time: {reason}", file=sys.stderr)
        self.folders.wait()
        self._load(runner, [endpoint for endpoint in endpoints if endpoint not in updated], flush_cache)
        return UpdateOutcome()

    async def _find_receivers(self, endpoints: list[Endpoint]) -> list[Receiver]:
        """Return the servers that answer.

        Raises:
            UserError: if one of them serves a different model.
        """
        starts = [server.starts for server in self.pool.servers] if self.pool else [0] * len(endpoints)

        async def ask(endpoint: Endpoint, starts: int) -> Receiver | None:
            try:
                check_model(endpoint.url, await endpoint.model_info(), self.policy.bridge.hf_config)
                return Receiver(endpoint, await endpoint.tensor_parallel_size(), starts)
            except ServerLostError:
                return None

        answers = await asyncio.gather(*[ask(e, n) for e, n in zip(endpoints, starts, strict=True)])
        return [receiver for receiver in answers if receiver is not None]

    def _load(self, runner: asyncio.Runner, endpoints: list[Endpoint], flush_cache: bool) -> list[str]:
        """See `load_on_servers`."""
        return runner.run(load_on_servers(endpoints, self.state, self.policy.bridge.hf_config, flush_cache))

    def _folder_complete(self, folder: Path, version: int) -> set[Path]:
        """Let servers start from a new folder; returns the older folders that servers are still loading."""
        return self.pool.start_with(folder, version) if self.pool else set()
