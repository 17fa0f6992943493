"""Hugging Face folders of the policy's weights, which servers load, and which restarted servers begin with."""

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
from megatron_rlvr.weights.export import export_folder
from megatron_rlvr.weights.huggingface_folder import write_folder


class WeightFolders:
    """One Hugging Face folder of the policy's weights per version. Each appears complete, by a rename.

    The newest stays on disk while its version is served, because a restarted server begins with it.

    Args:
        root: folder that the folders are written to.
        bridge: of the policy.
        on_complete: called with each complete folder and its version; from a background thread for a folder that was
            written in the background. Returns older folders that are still needed; the others are deleted.
    """

    def __init__(self, root: Path, bridge: PolicyBridge, on_complete: Callable[[Path, int], set[Path]]):
        self.root, self.bridge, self.on_complete = root, bridge, on_complete
        self._writer: threading.Thread | None = None
        self._failure: Exception | None = None

    def folder(self, version: int) -> Path:
        """The path of a version's folder, whether it exists or not."""
        return self.root / f"step_{version:06d}"

    def discard(self, version: int) -> None:
        """Delete a folder of that version, which an earlier run left and which holds other weights."""
        self.wait()
        shutil.rmtree(self.folder(version), ignore_errors=True)

    def write(self, policy: Policy, version: int) -> None:
        """Write the policy's present weights. Collective over the job; the main process writes."""
        if policy.layout.is_main:
            self.root.mkdir(parents=True, exist_ok=True)
        export_folder(self.bridge, policy.model_chunks, self.folder(version), write=policy.layout.is_main)
        if policy.layout.is_main:
            self._publish(version)

    def copying(self, stream: Iterable[Bucket], version: int) -> Iterator[Bucket]:
        """Pass buckets on and write their tensors to the version's folder in the background.

        Host memory holds what is not written yet.

        Raises:
            UserError: if the previous copy could not be written.
        """
        self.wait()
        self.root.mkdir(parents=True, exist_ok=True)
        unwritten: queue.SimpleQueue[Bucket | None] = queue.SimpleQueue()

        def tensors() -> Iterator[tuple[str, Tensor]]:
            while (bucket := unwritten.get()) is not None:
                yield from bucket.tensors()

        def write() -> None:
            try:
                write_folder(self.folder(version), tensors(), companions=self.bridge.path)
                self._publish(version)
            except Exception as error:  # raised by the next `wait`
                self._failure = error

        self._writer = threading.Thread(target=write, name="weights-copy", daemon=True)
        self._writer.start()
        try:
            for bucket in stream:
                unwritten.put(Bucket(bucket.flat.cpu(), bucket.dtype, bucket.names, bucket.shapes))
                yield bucket
                del bucket  # before the next one is allocated
        finally:
            unwritten.put(None)

    def wait(self) -> None:
        """Wait until the background copy is complete; raises the error that it failed with."""
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        if self._failure is not None:
            raise self._failure

    def _publish(self, version: int) -> None:
        needed = self.on_complete(self.folder(version), version) | {self.folder(version)}
        for other in self.root.iterdir():
            if other not in needed:
                shutil.rmtree(other)
