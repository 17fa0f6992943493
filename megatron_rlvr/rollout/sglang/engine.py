"""The rollout engine on SGLang servers: token ids go out over HTTP, token ids with log-probs come back."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path

from megatron_rlvr.backend import parallel
from megatron_rlvr.backend.policy import Policy
from megatron_rlvr.config import Config
from megatron_rlvr.errors import UserError
from megatron_rlvr.rollout.engine import Completion, SamplingPolicy
from megatron_rlvr.rollout.sglang.client import Client, Weights
from megatron_rlvr.rollout.sglang.server import ServerPool
from megatron_rlvr.rollout.sglang.weights import WeightFolders, load_everywhere


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
        self.context_length: int = policy.bridge.hf_config.max_position_embeddings
        self.folders = WeightFolders(directory / "weights", policy.bridge)
        self.weights = Weights(0, policy.bridge.path.resolve())
        self.pool: ServerPool | None = None
        urls = list(self.config.urls)
        if not urls:
            if self.layout.is_main:
                self._check_host()
                dtype = str(policy.bridge.dtype).removeprefix("torch.")
                self.pool = resources.enter_context(
                    ServerPool(self.config, self.weights.folder, dtype, directory / "logs")
                )
            urls = parallel.share_with_job(self.pool.urls if self.pool else None)
        self.urls = urls
        if self.config.urls:  # who knows what weights they hold
            self._load()

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingPolicy, seeds: Sequence[int]
    ) -> list[Completion]:
        """See `RolloutEngine.generate`; the same seed draws the same completion only on a deterministic server."""
        longest = max(len(prompt) for prompt in prompts)
        if longest + sampling.max_tokens > self.context_length:
            raise UserError(
                f"a prompt of {longest} tokens and rollout.max_tokens={sampling.max_tokens} are more than the model's "
                f"context of {self.context_length} tokens: lower rollout.max_tokens or data.max_prompt_tokens"
            )

        async def ask() -> list[Completion]:
            async with self._client() as client:
                return await client.generate(prompts, sampling, seeds)

        return asyncio.run(ask())

    def update_weights(self, version: int) -> None:
        """See `RolloutEngine.update_weights`: the weights go through a Hugging Face folder in the run directory."""
        folder = self.folders.write(self.policy, version)
        self.weights = Weights(version, folder)
        self._load()
        if self.layout.is_main:
            self.folders.keep_only(folder)

    def _load(self) -> None:
        """Give all servers the current weights; the other processes wait for the main one, which does it."""
        if self.layout.is_main:
            with self.pool.changing_weights() if self.pool else nullcontext():
                if self.pool:
                    self.pool.weights = (self.weights.folder, self.weights.version)

                async def load() -> list[str]:
                    async with self._client() as client:
                        return await load_everywhere(client, self.policy.bridge.hf_config)

                lost = asyncio.run(load())
            if len(lost) == len(self.urls) and not self.pool:
                raise UserError(f"no server of rollout.sglang.urls can be used: {'; '.join(lost)}")
        parallel.any_rank(False)

    def _client(self) -> Client:
        return Client(self.urls, self.config, self.weights, lambda: self.pool.failure if self.pool else None)

    def _check_host(self) -> None:
        machines = int(os.environ.get("WORLD_SIZE", "1")) > int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        if "LOCAL_WORLD_SIZE" in os.environ and machines and "host" not in self.config.server:
            raise UserError(
                "the job spans several machines, whose processes cannot reach a server at 127.0.0.1: set "
                "rollout.sglang.server.host to 0.0.0.0, or give rollout.sglang.urls"
            )
