"""Which weights the servers of a run are expected to hold."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_rlvr.data.completion import Completion


@dataclass
class ServerState:
    """The state that every server is expected to be in.

    Attributes:
        expected_version: version of the weights.
        folder: Hugging Face folder of these weights, which a server loads that lost them; None where there is no copy.
        max_staleness: how many versions older than `expected_version` the tokens of a completion may be.
        updating: True while servers receive weights. They need not answer then.
    """

    expected_version: int
    folder: Path | None
    max_staleness: int = 0
    updating: bool = False

    def folder_is_complete(self) -> bool:
        """Whether the folder can be loaded. It appears under its name once all of its files are written."""
        return self.folder is not None and self.folder.is_dir()

    def accepts(self, completion: Completion) -> bool:
        """Whether all tokens of a completion were drawn by weights that are recent enough."""
        oldest_accepted = self.expected_version - self.max_staleness
        return oldest_accepted <= completion.oldest_version and completion.weight_version <= self.expected_version
