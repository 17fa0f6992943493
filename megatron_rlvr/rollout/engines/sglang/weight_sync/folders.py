"""Hugging Face folders of the policy's weights, for servers to load and for restarted servers to start from."""

from __future__ import annotations

import queue
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_rlvr.megatron.bridge import PolicyBridge
from megatron_rlvr.weights.buckets import Bucket
from megatron_rlvr.weights.export import write_in_turns
from megatron_rlvr.weights.huggingface_folder import write_folder


class WeightFolders:
    """Writes one Hugging Face folder per version of the policy's weights. A folder gets its name when it is complete.

    A folder stays on disk while servers are expected to hold its version, because a restarted server loads it.

    Args:
        root: parent of the folders.
        quantization: ``quantization_config`` of their config.json; None for weights that are not quantized.
        bridge: bridge of the policy, whose model folder provides the configuration and tokenizer files.
        on_complete: called with each complete folder and its version, for background copies from their thread. Returns
            older folders that are still needed; the others are deleted.
    """

    def __init__(
        self,
        root: Path,
        bridge: PolicyBridge,
        on_complete: Callable[[Path, int], set[Path]],
        quantization: Mapping[str, Any] | None = None,
    ):
        self.root, self.bridge, self.on_complete, self.quantization = root, bridge, on_complete, quantization
        self._needed: set[Path] = set()
        self._writer: threading.Thread | None = None
        self._failure: Exception | None = None

    def folder(self, version: int) -> Path:
        """Return the path of a version's folder, which need not exist."""
        return self.root / f"step_{version:06d}"

    def discard(self, version: int) -> None:
        """Delete a folder of this version that an earlier start of the run left; it may hold other weights."""
        self.wait()
        shutil.rmtree(self.folder(version), ignore_errors=True)

    def write(self, tensors: Iterable[tuple[str, Tensor]], version: int, *, is_main: bool) -> None:
        """Write an export of the policy's current weights from the main process. Collective over the job.

        Older folders stay until `delete_older`, because servers may be loading them.
        """
        if is_main:
            self.root.mkdir(parents=True, exist_ok=True)
        write = partial(self._write_folder, version=version) if is_main else None
        write_in_turns(tensors, self.folder(version), write)

    def _write_folder(self, tensors: Iterator[tuple[str, Tensor]], version: int) -> None:
        write_folder(self.folder(version), tensors, companions=self.bridge.path, quantization=self.quantization)
        folder = self.folder(version)
        self._needed = self.on_complete(folder, version) | {folder}

    def delete_older(self) -> None:
        """Delete the folders that the newest one replaced. No process may expect their weights any more."""
        for folder in self.root.iterdir():
            if folder not in self._needed:
                shutil.rmtree(folder)

    def copying(self, stream: Iterable[Bucket], version: int) -> Iterator[Bucket]:
        """Yield the buckets of `stream` and write their tensors to the version's folder in the background.

        Tensors that are not written yet are kept in host memory. A complete folder replaces older ones.

        Raises:
            Exception: the error of the previous copy, if it could not be written.
        """
        self.wait()
        self.root.mkdir(parents=True, exist_ok=True)
        unwritten: queue.SimpleQueue[Bucket | None] = queue.SimpleQueue()

        def tensors() -> Iterator[tuple[str, Tensor]]:
            while (bucket := unwritten.get()) is not None:
                yield from bucket.tensors()

        def write() -> None:
            try:
                self._write_folder(tensors(), version)
                self.delete_older()
            except Exception as error:  # `wait` raises it
                self._failure = error

        self._writer = threading.Thread(target=write, name="weights-copy", daemon=True)
        self._writer.start()
        try:
            for bucket in stream:
                unwritten.put(Bucket(bucket.flat.to("cpu", copy=True), bucket.names, bucket.dtypes, bucket.shapes))
                yield bucket
        finally:
            unwritten.put(None)

    def wait(self) -> None:
        """Wait until the background copy is complete; raises its error if it failed."""
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        if self._failure is not None:
            raise self._failure
