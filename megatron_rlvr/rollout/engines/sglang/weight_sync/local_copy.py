"""A node's own copy of the policy's weights, which the servers of the node load, and which deltas bring up to date."""

from __future__ import annotations

import fcntl
import hashlib
import re
import shutil
from collections.abc import Callable
from io import BufferedIOBase
from pathlib import Path, PurePosixPath

from megatron_rlvr.atomic_write import replace_folder
from megatron_rlvr.checksums import DamagedError
from megatron_rlvr.errors import UserError
from megatron_rlvr.rollout.engines.sglang.server_files import LOCK, remove_abandoned
from megatron_rlvr.weights import delta

_PREFIX = "rlvr-weights-"
_INCOMING = "incoming_"
_BLOCK_BYTES = 2**20


class StaleCopyError(Exception):
    """A delta does not apply to the weights of this copy. It needs the full weights."""


def copy_root(parent: str, run: Path) -> Path:
    """Return the folder of a run's copies, which has the same path on every node.

    Args:
        parent: node-local folder, ``rollout.sglang.local_folder``.
        run: folder of the run that all nodes see.
    """
    return Path(parent) / f"{_PREFIX}{hashlib.sha256(str(run).encode()).hexdigest()[:16]}"


class LocalCopy:
    """The newest weights of a run in a folder of this node. Every version gets a folder of its own, complete at once.

    The copy lasts as long as this object, so a process that starts again begins with full weights. Copies of processes
    that were killed are removed by the next one on the node.

    Args:
        root: result of `copy_root`.
        on_complete: called with each complete folder and its version; returns older folders that are still needed.

    Raises:
        UserError: if the folder cannot be written, or another process uses it.
    """

    def __init__(self, root: Path, on_complete: Callable[[Path, int], set[Path]] = lambda folder, version: set()):
        self.root, self.on_complete = root, on_complete
        self.version: int | None = None
        self._chain = ""
        try:
            root.parent.mkdir(parents=True, exist_ok=True)
            remove_abandoned(root.parent, _PREFIX)
            root.mkdir(mode=0o700, exist_ok=True)
            self._lock = (root / LOCK).open("w")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{root} is used by another process of this run directory: end it, or set another "
                "rollout.sglang.local_folder"
            ) from None
        except OSError as error:
            raise UserError(
                f"{root} cannot be written ({error}): set rollout.sglang.local_folder to a folder of this node"
            ) from error

    def folder(self, version: int) -> Path:
        """Return the path of a version's folder, which need not exist."""
        return self.root / f"step_{version:06d}"

    def current(self) -> Path | None:
        """Return the folder of the newest weights; None without weights, or if the folder was removed."""
        folder = None if self.version is None else self.folder(self.version)
        return folder if folder is not None and folder.is_dir() else None

    def incoming(self, checksum: str) -> Path:
        """Return the folder for files that arrive over the network; `checksum` is that of their list."""
        return self.root / f"{_INCOMING}{checksum}"

    def expect(self, checksum: str) -> None:
        """Prepare for the files of a folder, in place of those of other folders.

        Raises:
            UserError: if the folder cannot be written.
        """
        if not re.fullmatch("[0-9a-f]{64}", checksum):
            raise UserError(f"{checksum[:100]!r} is no SHA-256")
        for other in self.root.glob(f"{_INCOMING}*"):
            shutil.rmtree(other, ignore_errors=True)
        try:
            self.incoming(checksum).mkdir()
        except OSError as error:
            raise UserError(f"{self.root} cannot be written: {error}") from error

    def receive(self, checksum: str, name: str, file: BufferedIOBase, length: int) -> None:
        """Write a file that arrives over the network.

        Args:
            checksum: that of `expect`.
            name: its path relative to the folder.
            file: its bytes.
            length: their number.

        Raises:
            StaleCopyError: if another folder is expected.
            DamagedError: if its name leads out of the folder, or bytes are missing.
            UserError: if it cannot be written.
        """
        folder = self.incoming(checksum)
        parts = PurePosixPath(name).parts
        if not parts or name.startswith("/") or ".." in parts or "\0" in name:
            raise DamagedError(f"{name[:100]!r} is no name of a file of weights")
        if not folder.is_dir():
            raise StaleCopyError("other weights were offered")
        try:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            with (folder / name).open("wb") as written:
                while length and (block := file.read(min(length, _BLOCK_BYTES))):
                    written.write(block)
                    length -= len(block)
        except OSError as error:
            raise UserError(f"{folder / name} cannot be written: {error}; free some space") from error
        if length:
            raise DamagedError(f"{name} lacks {length} bytes")

    def take_full(self, source: Path, version: int, chain: str) -> None:
        """Copy full weights, which begin a chain of deltas. Those that arrived over the network are moved.

        Args:
            source: Hugging Face folder with checksums.
            version: version of the weights.
            chain: name of the chain, different for all full weights of all runs.

        Raises:
            DamagedError: if a file differs from its checksum.
            UserError: if the folder cannot be written.
        """
        if source.parent == self.root:
            delta.verify(source)
            replace_folder(source, self.folder(version))
        else:
            delta.copy_folder(self.folder(version), source)
        self._publish(version, chain)

    def apply(self, folder: Path) -> None:
        """Bring the copy up to date with a delta.

        Raises:
            StaleCopyError: if the delta is not the next one of this copy's chain.
            DamagedError: if a file of the delta differs from its checksum.
            UserError: if the new folder cannot be written.
        """
        about = delta.read_delta(folder)
        base = self.current()
        if base is None:
            raise StaleCopyError("it has no weights")
        if (about.chain, about.base) != (self._chain, self.version):
            held = "other weights" if about.chain != self._chain else "weights"
            raise StaleCopyError(f"it holds {held} of step {self.version}, and the delta is one to step {about.base}")
        delta.apply_delta(self.folder(about.version), base, folder)
        self._publish(about.version, about.chain)

    def close(self) -> None:
        """Remove the copy."""
        shutil.rmtree(self.root, ignore_errors=True)
        self._lock.close()

    def _publish(self, version: int, chain: str) -> None:
        self.version, self._chain = version, chain
        needed = self.on_complete(self.folder(version), version) | {self.folder(version), self.root / LOCK}
        for other in self.root.iterdir():
            if other not in needed:
                shutil.rmtree(other)
