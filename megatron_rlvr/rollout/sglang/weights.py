"""Weights on their way from the trainer to the servers."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_rlvr.rollout.sglang.client import Client, Endpoint, ServerLostError
from megatron_rlvr.rollout.sglang.identity import check_model

if TYPE_CHECKING:  # the client's half needs no megatron-core
    from megatron_rlvr.backend.huggingface import PolicyBridge
    from megatron_rlvr.backend.policy import Policy


class WeightFolders:
    """Hugging Face folders of the policy's weights, one a version; each appears whole, by a rename.

    The newest stays on disk while its version is served: a server that is started again begins with it.
    """

    def __init__(self, root: Path, bridge: PolicyBridge):
        self.root, self.bridge = root, bridge

    def write(self, policy: Policy, version: int) -> Path:
        """Write the present weights. Collective over the job; the main process touches the disk."""
        folder = self.root / f"step_{version:06d}"
        if policy.layout.is_main:
            self.root.mkdir(parents=True, exist_ok=True)
        self.bridge.save(policy.parts, folder, write=policy.layout.is_main)
        return folder

    def keep_only(self, folder: Path) -> None:
        """Remove the folders of all other versions."""
        for other in self.root.iterdir():
            if other != folder:
                shutil.rmtree(other)


async def load_everywhere(client: Client, hf_config: Any) -> list[str]:
    """Have every server load the client's weights, all at once; returns why those that did not answer did not.

    A server that is lost here gets the weights when it is back, before it is asked anything.

    Raises:
        UserError: when a server has another model, refuses them, or then names another version.
    """

    async def load(endpoint: Endpoint) -> str | None:
        try:
            check_model(endpoint.url, await client.model_info(endpoint), hf_config)
            await client.load_weights(endpoint)
        except ServerLostError as error:
            return f"{endpoint.url}: {error}"
        return None

    failures = await asyncio.gather(*[load(endpoint) for endpoint in client.endpoints])
    return [failure for failure in failures if failure is not None]
