"""How training ended on one node, for the batch script and for the launchers of the other nodes."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from megatron_rlvr.atomic_write import write_text
from megatron_rlvr.node import node_name

# torchrun waits 30 s between SIGTERM and SIGKILL, so the outcome of one node can come that much later than another's.
_OTHER_NODES_TIMEOUT_S = 60


@dataclass(frozen=True)
class Outcome:
    """How the ranks of a node ended.

    Attributes:
        status: exit status of the launcher.
        reason: one line; empty if the status is 0.
        failed: when the first rank failed, in seconds since the epoch. Of nodes with equal statuses the batch script
            reports the one that failed first, because the others may have failed because of it.
    """

    status: int
    reason: str = ""
    failed: float | None = None

    def write(self, logs: Path) -> None:
        """Write ``outcome.NODE``: a line with the status and the reason, then ``at TIME``."""
        at = "" if self.failed is None else f"at {self.failed:.6f}\n"
        write_text(logs / f"outcome.{node_name()}", f"{self.status} {self.reason}\n{at}")


def await_outcomes(logs: Path, nodes: int) -> None:
    """Wait until all nodes have written their outcomes, for at most a minute."""
    deadline = time.monotonic() + _OTHER_NODES_TIMEOUT_S
    while len(list(logs.glob("outcome.*"))) < nodes and time.monotonic() < deadline:
        time.sleep(0.05)
