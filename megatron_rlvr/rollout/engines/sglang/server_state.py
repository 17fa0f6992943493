"""The weights that the servers of a run should hold."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from megatron_rlvr.data.completion import Completion


@dataclass
class ServerState:
    """The state that every server should be in.

    Attributes:
        expected_version: version of the weights.
        folder: Hugging Face folder of these weights, from which a restarted server loads them; None without a copy.
        max_staleness: how many versions older than `expected_version` the tokens of a completion may be.
        node_local: whether every node has a folder of its own under that path, which this process need not see.
        without_folder: URLs of servers whose nodes have no such folder of the expected weights.
        updating: whether servers are receiving weights. They need not answer meanwhile.
        key: the key that the servers demand; None if they demand none.
    """

    expected_version: int
    folder: Path | None
    max_staleness: int = 0
    node_local: bool = False
    without_folder: frozenset[str] = frozenset()
    updating: bool = False
    key: str | None = field(default=None, repr=False)

    def folder_is_complete(self) -> bool:
        """Whether the folder can be loaded. A folder gets its name when all of its files are written."""
        if self.folder is None:
            return False
        return self.folder.is_dir() or (self.node_local and not self.updating)

    def accepts(self, completion: Completion) -> bool:
        """Whether all tokens of a completion were generated with weights that are recent enough."""
        oldest_accepted = self.expected_version - self.max_staleness
        return oldest_accepted <= completion.oldest_version and completion.weight_version <= self.expected_version
