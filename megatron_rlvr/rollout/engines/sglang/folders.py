"""Hugging Face folders of the policy's weights: what ``disk`` serves, and what a server starts with again."""

from __future__ import annotations

import queue
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from torch import Tensor

from megatron_rlvr.megatron.bridge import PolicyBridge
from megatron_rlvr.training.policy import Policy
from megatron_rlvr.weights.buckets import Bucket
from megatron_rlvr.weights.huggingface_folder import write_folder


class WeightFolders:
    """Hugging Face folders of the policy's weights, one a version; each appears whole, by a rename.

    The newest stays on disk while its version is served: a server that is started again begins with it.

    Args:
        root: folder of the folders.
        bridge: of the policy.
        published: called with each folder and version when it is complete, from a thread where that was written in the
            background; returns older folders that are still needed.
    """

    def __init__(self, root: Path, bridge: PolicyBridge, published: Callable[[Path, int], set[Path]]):
        self.root, self.bridge, self.published = root, bridge, published
        self._writer: threading.Thread | None = None
        self._failure: Exception | None = None

    def folder(self, version: int) -> Path:
        return self.root / f"step_{version:06d}"

    def discard(self, version: int) -> None:
        """Remove a folder of that version, which would be of other weights."""
        self.wait()
        shutil.rmtree(self.folder(version), ignore_errors=True)

    def write(self, policy: Policy, version: int) -> None:
        """Write the present weights. Collective over the job; the main process touches the disk."""
        if policy.layout.is_main:
            self.root.mkdir(parents=True, exist_ok=True)
        self.bridge.save(policy.model_chunks, self.folder(version), write=policy.layout.is_main)
        if policy.layout.is_main:
            self._publish(version)

    def copying(self, stream: Iterable[Bucket], version: int) -> Iterator[Bucket]:
        """Pass buckets on, and write what is in them in the background; the host's memory holds what is not written.

        Raises:
            UserError: when the copy before could not be written.
        """
        self.wait()
        self.root.mkdir(parents=True, exist_ok=True)
        waiting: queue.SimpleQueue[Bucket | None] = queue.SimpleQueue()

        def tensors() -> Iterator[tuple[str, Tensor]]:
            while (bucket := waiting.get()) is not None:
                yield from bucket.tensors()

        def write() -> None:
            try:
                write_folder(self.folder(version), tensors(), companions=self.bridge.path)
                self._publish(version)
            except Exception as error:  # told by the next `wait`
                self._failure = error

        self._writer = threading.Thread(target=write, name="weights-copy", daemon=True)
        self._writer.start()
        try:
            for bucket in stream:
                waiting.put(Bucket(bucket.flat.cpu(), bucket.dtype, bucket.names, bucket.shapes))
                yield bucket
                del bucket  # before the next is allocated
        finally:
            waiting.put(None)

    def wait(self) -> None:
        """Until the background copy is complete; raises what it failed with."""
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        if self._failure is not None:
            raise self._failure

    def _publish(self, version: int) -> None:
        needed = self.published(self.folder(version), version) | {self.folder(version)}
        for other in self.root.iterdir():
            if other not in needed:
                shutil.rmtree(other)
