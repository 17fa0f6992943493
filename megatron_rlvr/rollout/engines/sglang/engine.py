"""The rollout engine on SGLang servers, which sends token ids over HTTP and receives token ids with log-probs."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

from megatron_rlvr.data.completion import Completion
from megatron_rlvr.errors import UserError
from megatron_rlvr.megatron import device, waiting
from megatron_rlvr.megatron.bridge import PolicyBridge
from megatron_rlvr.megatron.huggingface_config import is_tied
from megatron_rlvr.node import node_name
from megatron_rlvr.node_address import LOOPBACK
from megatron_rlvr.rollout.config import RolloutConfig
from megatron_rlvr.rollout.engines.base import GroupRequest, OnGroup
from megatron_rlvr.rollout.engines.sglang import kept_sets, routed_experts
from megatron_rlvr.rollout.engines.sglang.client import Client
from megatron_rlvr.rollout.engines.sglang.config import SGLangConfig
from megatron_rlvr.rollout.engines.sglang.endpoint import Endpoint, ServerLostError
from megatron_rlvr.rollout.engines.sglang.fp8_servers import check_blocks, start_folder
from megatron_rlvr.rollout.engines.sglang.kept_sets import is_cut, requested_top_k, with_kept_sets
from megatron_rlvr.rollout.engines.sglang.registry import ServerPlace, read_registry
from megatron_rlvr.rollout.engines.sglang.routed_experts import with_routed_experts
from megatron_rlvr.rollout.engines.sglang.server_key import key_from_environment
from megatron_rlvr.rollout.engines.sglang.server_pool import ServerPool
from megatron_rlvr.rollout.engines.sglang.server_state import ServerState
from megatron_rlvr.rollout.engines.sglang.weight_sync.placement import gpu_uuids, nccl_version
from megatron_rlvr.rollout.engines.sglang.weight_sync.sync import UpdateOutcome, WeightSync
from megatron_rlvr.rollout.sampling import SamplingSettings
from megatron_rlvr.rollout.tokenization import exceeds_context
from megatron_rlvr.training.policy import Policy

_NEVER_TIED = ("qwen3_moe", "mixtral", "glm4_moe")
"""Models whose `tie_word_embeddings` SGLang 0.5.23 does not read (its ``models/*.py``)."""


class SGLangEngine:
    """Generates on SGLang servers that the main process starts, or that are already running.

    The leader of every data-parallel rank is a client of all servers. Construction is collective over the job.

    Args:
        rollout: section ``rollout`` of the configuration, with ``auto`` resolved.
        directory: folder for the servers' logs and for weights that they load from disk.
        policy: the policy whose weights the servers receive.
        resources: stops the servers when it is closed.

    Raises:
        UserError: if a server does not start, cannot be reached, or serves a different model.
    """

    streaming = True
    draws_from_policy = True

    def __init__(self, rollout: RolloutConfig, directory: Path, policy: Policy, resources: ExitStack):
        self.config, self.policy = rollout.sglang, policy
        self.layout = policy.layout
        _check_output_layer(policy.bridge)
        directory = directory.resolve()
        model_folder = start_folder(self.config, policy.bridge.path)
        self.state = ServerState(0, model_folder, max_staleness=rollout.max_staleness)
        self.pool: ServerPool | None = None
        urls = list(self.config.urls)
        if not urls:
            if self.layout.is_main:
                _check_reachable(self.config)
                dtype = str(policy.bridge.dtype).removeprefix("torch.")
                servers = with_routed_experts(rollout, with_kept_sets(rollout, model_folder))
                self.pool = resources.enter_context(ServerPool(servers, model_folder, dtype, directory / "logs"))
            started = (self.pool.urls, self.pool.key) if self.pool else None
            urls, self.state.key = waiting.broadcast_from_main(started, "the start of the SGLang servers")
        else:
            self.state.key = key_from_environment()
        self.urls = urls
        places, ranks = waiting.broadcast_from_main(
            asyncio.run(self._locate(urls)) if self.layout.is_main else None, "the places of the SGLang servers"
        )
        quantize = rollout.quantization == "fp8"
        if quantize:
            check_blocks(self.config, model_folder, policy.bridge.hf_config)
        self.weight_sync = WeightSync(
            self.config, policy, places, ranks, self.state, directory / "weights", self.pool, quantize
        )
        resources.callback(self.weight_sync.close)
        if self.layout.is_main:
            asyncio.run(self._check_servers(rollout))
        self._outcome = UpdateOutcome()
        self._generating = 0  # calls of `generate` that have not returned
        self._generation_ended = threading.Condition()
        self._offloaded = False
        self._health_checks_off = ExitStack()
        if self.config.urls:  # these servers may hold any weights
            if self.layout.is_main:
                self.weight_sync.load_first_weights()
            waiting.barrier("the first weights on the SGLang servers")

    def generate(
        self, requests: Sequence[GroupRequest], sampling: SamplingSettings, on_group: OnGroup | None = None
    ) -> list[list[Completion]]:
        """See `RolloutEngine.generate`. The same seed draws the same completion only on deterministic servers."""
        if self._outcome.user_error:
            raise UserError(self._outcome.user_error)
        context_length = self.policy.bridge.context_length
        longest = max(len(request.prompt) for request in requests)
        if exceeds_context(longest, sampling.max_tokens, context_length):
            raise UserError(
                f"a prompt of {longest} tokens and rollout.max_tokens={sampling.max_tokens} exceed the model's context "
                f"of {context_length} tokens: lower rollout.max_tokens or data.max_prompt_tokens"
            )

        if sampling.returns_kept:
            sampling = replace(sampling, top_k=requested_top_k(sampling.top_k, self.policy.bridge.vocab_size))

        async def ask() -> list[list[Completion]]:
            async with Client(self.urls, self.config, self.state, self._unavailable) as client:
                return await client.generate(requests, sampling, on_group)

        with self._generation_ended:
            self._generating += 1
        try:
            return asyncio.run(ask())
        finally:
            with self._generation_ended:
                self._generating -= 1
                self._generation_ended.notify_all()

    async def _locate(self, urls: list[str]) -> tuple[list[ServerPlace], list[int]]:
        """Return where the servers run and how many ranks each has. Called by the main process."""
        if self.pool is not None:
            needs_nccl = self.config.weight_sync == "distributed" and any(server.gpus for server in self.pool.servers)
            nccl = nccl_version(self.config.python or sys.executable) if needs_nccl else None
            places = [ServerPlace(s.url, node_name(), gpu_uuids(s.gpus), nccl) for s in self.pool.servers]
        elif self.config.registry is not None:
            known = {place.url: place for place in read_registry(Path(self.config.registry))}
            if missing := [url for url in urls if url not in known]:
                raise UserError(
                    f"rollout.sglang.registry={self.config.registry} does not describe the server at {missing[0]} of "
                    f"rollout.sglang.urls (it describes {', '.join(known)}): give the URLs as they stand there"
                )
            places = [known[url] for url in urls]
        elif self.config.weight_sync == "tensor" and device.on_gpu():
            raise UserError(
                "rollout.sglang.weight_sync=tensor needs rollout.sglang.registry for servers of rollout.sglang.urls, "
                "because each of their ranks reads the memory of the process on its own GPU: start them with "
                "megatron_rlvr.cluster.serve, or set weight_sync=disk"
            )
        else:
            places = [ServerPlace(url, node_name()) for url in urls]
        if self.config.weight_sync == "delta":
            _check_copies(places, sure=self.pool is not None or self.config.registry is not None)

        async def ranks(place: ServerPlace) -> int:
            if place.gpus or self.config.weight_sync != "tensor":
                return len(place.gpus)
            try:
                return await Endpoint(place.url, self.config, key=self.state.key).tensor_parallel_size()
            except ServerLostError:
                return 1

        return places, list(await asyncio.gather(*[ranks(place) for place in places]))

    async def _check_servers(self, rollout: RolloutConfig) -> None:
        """Refuse servers that cannot return what training needs of tokens. Servers that do not answer are skipped."""
        needed = requested_top_k(rollout.top_k, self.policy.bridge.vocab_size)
        for endpoint in self.weight_sync.control.endpoints():
            with suppress(ServerLostError):
                if is_cut(rollout):
                    await kept_sets.check_server(endpoint, needed)
                if rollout.routing_replay:
                    await routed_experts.check_server(endpoint)

    def assist(self) -> None:
        """See `RolloutEngine.assist`. Only the leader talks to the servers, so there is nothing to do."""

    def dismiss(self) -> None:
        pass

    def offload(self) -> None:
        """See `RolloutEngine.offload`. Servers release their memory if ``rollout.sglang.release_memory`` is set."""
        if not self.config.release_memory:
            return
        waiting.barrier("the rollouts of all ranks, after which servers release their memory")
        self._offloaded = True
        if self.layout.is_main:
            if self.pool:
                self._health_checks_off.enter_context(self.pool.without_health_checks())
            asyncio.run(self.weight_sync.control.release_memory())

    def update_weights(self, version: int) -> dict[str, float]:
        """See `RolloutEngine.update_weights`. ``rollout.sglang.weight_sync`` selects how the weights are sent.

        With ``rollout.max_staleness``, completions may be in flight; ``rollout.sglang.interrupt`` says what happens to
        them.
        """
        if self.config.interrupt == "finish":
            with self._generation_ended:
                self._generation_ended.wait_for(lambda: self._generating == 0)
        self._outcome = UpdateOutcome()  # clients that wait for a server keep waiting during the update
        self._outcome = self.weight_sync.publish(version, self._offloaded)
        self._health_checks_off.close()
        self._offloaded = False
        return self.weight_sync.deltas.metrics if self.weight_sync.deltas else {}

    def _unavailable(self) -> str | None:
        return self._outcome.unavailable or (self.pool.failure if self.pool else None)


def _check_output_layer(bridge: PolicyBridge) -> None:
    """Refuse models for which SGLang 0.5.23 would use an output layer of its own, with random weights."""
    model_type = bridge.hf_config.model_type
    if model_type in _NEVER_TIED and is_tied(bridge.hf_config):
        raise UserError(
            f"SGLang does not tie the output layer of {model_type} models to their embedding, as {bridge.path} does: "
            "use rollout.engine=local, or store the output layer in the folder with tie_word_embeddings=false"
        )


def _check_copies(places: Sequence[ServerPlace], sure: bool) -> None:
    """Refuse servers on nodes that keep no copy of the weights for ``weight_sync: delta``.

    Args:
        places: where the servers run.
        sure: whether that is known; otherwise only servers at the loopback address are on this node.
    """
    for place in places:
        here = place.node == node_name() and (sure or urlsplit(place.url).hostname in (LOOPBACK, "localhost"))
        if place.copies is None and not here:
            raise UserError(
                f"rollout.sglang.weight_sync=delta: no process keeps a copy of the weights on the node of {place.url}: "
                "start its servers with megatron_rlvr.cluster.serve and this configuration, and set "
                "rollout.sglang.registry, or set weight_sync=disk"
            )


def _check_reachable(config: SGLangConfig) -> None:
    """Refuse servers on the loopback interface in a job that spans several machines."""
    several_machines = int(os.environ.get("WORLD_SIZE", "1")) > int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if "LOCAL_WORLD_SIZE" in os.environ and several_machines and "host" not in config.server:
        raise UserError(
            "the job spans several machines, whose processes cannot reach a server at 127.0.0.1: set "
            "rollout.sglang.server.host to 0.0.0.0, or set rollout.sglang.urls"
        )
