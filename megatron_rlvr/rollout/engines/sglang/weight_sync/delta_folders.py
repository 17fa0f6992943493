"""Weights that reach the nodes as deltas: written once to the run directory, applied to a copy on every node.

Nodes that do not see the run directory receive its files over HTTP.
"""

from __future__ import annotations

import asyncio
import secrets
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_rlvr.checksums import DamagedError
from megatron_rlvr.errors import UserError
from megatron_rlvr.megatron.bridge import PolicyBridge
from megatron_rlvr.node import node_name
from megatron_rlvr.rollout.engines.sglang.config import SGLangConfig
from megatron_rlvr.rollout.engines.sglang.endpoint import Endpoint, ServerLostError
from megatron_rlvr.rollout.engines.sglang.registry import ServerPlace
from megatron_rlvr.rollout.engines.sglang.weight_sync.local_copy import LocalCopy, StaleCopyError, copy_root
from megatron_rlvr.rollout.engines.sglang.weight_sync.node_copy import NodeCopy
from megatron_rlvr.weights.delta import Delta, copy_folder, write_checksums, write_delta
from megatron_rlvr.weights.export import write_in_turns
from megatron_rlvr.weights.huggingface_folder import write_folder


class DeltaFolders:
    """Writes what changed since the last version, and brings the copies of all nodes up to date.

    The copy of the main process's node is also what the next version is compared with. Every ``full_sync_every``
    versions, and whenever that copy is not of the version before, the full weights travel. A node that refuses a delta,
    because it missed one or the delta is damaged, gets the full weights, too.

    Args:
        config: section ``rollout.sglang``.
        root: folder of the run, in which the weights are written that travel.
        bridge: bridge of the policy, whose model folder provides the configuration and tokenizer files.
        places: where the servers run.
        key: key of the nodes' services.
        on_complete: see `LocalCopy`; for the node of the main process.
        quantization: ``quantization_config`` of config.json; None for weights that are not quantized.
        is_main: whether this is the main process, which alone writes.

    Attributes:
        metrics: what the last `write` and `deliver` measured, on the main process.
        without_weights: URLs of the servers whose nodes have no copy of the newest weights.
    """

    def __init__(
        self,
        config: SGLangConfig,
        root: Path,
        bridge: PolicyBridge,
        places: Sequence[ServerPlace],
        key: str | None,
        on_complete: Callable[[Path, int], set[Path]],
        quantization: Mapping[str, Any] | None,
        is_main: bool,
    ):
        self.config, self.root, self.bridge, self.key, self.quantization = config, root, bridge, key, quantization
        self._copies = copy_root(config.local_folder, root)
        self.copy = LocalCopy(self._copies, on_complete) if is_main else None
        self._chain = ""
        self._services: dict[str, list[str]] = {}  # URLs of the servers that load the copy of each service
        self._receivers: set[str] = set()  # services whose node does not see the run directory
        for place in places:
            if place.node != node_name():
                assert place.copies is not None  # `SGLangEngine` refuses these places
                self._services.setdefault(place.copies, []).append(place.url)
        self.metrics: dict[str, float] = {}
        self.without_weights: frozenset[str] = frozenset()

    def folder(self, version: int) -> Path:
        """Return the path of a version's folder, the same on every node with servers."""
        return self._copies / f"step_{version:06d}"

    def close(self) -> None:
        """Remove the copy of this node and what travelled."""
        if self.copy is not None:
            self.copy.close()
            shutil.rmtree(self.root, ignore_errors=True)

    def write(self, tensors: Iterable[tuple[str, Tensor]], version: int, *, is_main: bool) -> None:
        """Write a delta, or the full weights, and apply it on this node. Collective over the job."""
        write = partial(self._write, version=version) if is_main else None
        write_in_turns(tensors, self.root / f"step_{version:06d}", write)

    def _write(self, tensors: Iterator[tuple[str, Tensor]], version: int) -> None:
        copy = self.copy
        assert copy is not None
        shutil.rmtree(self.root, ignore_errors=True)  # everything there has travelled
        self.root.mkdir(parents=True)
        base, full = copy.current(), self.root / f"full_{version:06d}"
        if base is not None and copy.version == version - 1 and version % self.config.full_sync_every:
            self._sent = self.root / f"delta_{version:06d}"
            about = write_delta(self._sent, base, tensors, Delta(self._chain, version - 1, version))
            try:
                copy.apply(self._sent)
            except (DamagedError, StaleCopyError) as error:
                raise UserError(f"{self._sent} cannot be applied: {error}; check the disk and resume") from error
            self.metrics = {
                "weight_sync/bytes": about.nbytes,
                "weight_sync/changed_fraction": about.changed / about.elements,
                "weight_sync/full": 0.0,
            }
            return
        self._sent, self._chain = full, secrets.token_hex(16)
        write_folder(full, tensors, companions=self.bridge.path, quantization=self.quantization)
        write_checksums(full)
        copy.take_full(full, version, self._chain)
        self.metrics = {"weight_sync/bytes": _tensor_bytes(full), "weight_sync/full": 1.0}

    async def deliver(self, version: int) -> None:
        """Bring the copies of the other nodes up to date. Called by the main process."""
        full, action = self.root / f"full_{version:06d}", f"take the weights of step {version}"
        writing_full = asyncio.Lock()

        async def to_node(service: str) -> tuple[Sequence[str], int]:
            """Return the servers of the node that get no weights, and the bytes that it received over HTTP."""
            endpoint = Endpoint(service, self.config, key=self.key)
            node = NodeCopy(endpoint, self._copies)
            try:
                if self._sent != full:
                    try:
                        await node.take(self._sent, action)
                        return [], node.sent
                    except UserError as error:
                        print(f"warning: {error}; it gets the full weights", file=sys.stderr)
                    async with writing_full:
                        if not full.is_dir():
                            await asyncio.to_thread(self._write_full, full)
                await node.take(full, action, version=version, chain=self._chain)
                return [], node.sent
            except (UserError, ServerLostError) as error:
                print(f"warning: a node has no weights of step {version}: {error}", file=sys.stderr)
                return self._services[service], node.sent
            finally:
                endpoint.connections.close()
                if node.sees_run is False and service not in self._receivers:
                    self._receivers.add(service)
                    print(
                        f"the node of {service} does not see {self.root}: weights reach it over HTTP", file=sys.stderr
                    )

        outcomes = await asyncio.gather(*[to_node(service) for service in self._services])
        self.without_weights = frozenset(url for urls, _ in outcomes for url in urls)
        if self._services:
            self.metrics["weight_sync/http_bytes"] = float(sum(sent for _, sent in outcomes))

    def _write_full(self, full: Path) -> None:
        """Write the full weights of the newest version, from the copy of this node."""
        assert self.copy is not None
        current = self.copy.current()
        assert current is not None
        write_checksums(current)
        copy_folder(full, current)


def _tensor_bytes(folder: Path) -> float:
    return float(sum(file.stat().st_size for file in folder.glob("*.safetensors")))
