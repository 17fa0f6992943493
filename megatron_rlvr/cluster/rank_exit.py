"""How the ranks of a node ended, and which of them failed first.

When one rank fails, torchrun ends the others, and ranks that wait for it in a collective fail, too. Neither their exit
statuses nor the order in which the launcher notices them say which rank was the cause. The supervisor of every rank
therefore leaves a record: when the rank failed, and whether it had received SIGTERM by then.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_rlvr.atomic_write import write_text
from megatron_rlvr.checked_input import InvalidInputError, field, parse_object
from megatron_rlvr.exit_status import EXIT_STOPPED, EXIT_USER_ERROR

STOP_SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)


def log_path(logs: Path, rank: int) -> Path:
    """Return the path of a rank's log."""
    return logs / f"rank_{rank}.log"


def exit_path(logs: Path, rank: int) -> Path:
    """Return the path of the record that a rank's supervisor leaves."""
    return logs / f"rank_{rank}.exit"


def failure_path(logs: Path, rank: int) -> Path:
    """Return the path at which a rank itself records its failure (`megatron_rlvr.exit_status.failure_recorded`)."""
    return logs / f"rank_{rank}.failure"


@dataclass(frozen=True)
class RankExit:
    """How one rank ended.

    Attributes:
        code: exit status; negative for the signal that killed it.
        time: when it failed, in seconds since the epoch: when it raised its exception if it recorded that, else when it
            exited. A rank that raises can take longer to exit than the ranks that fail because of it.
        terminated: whether it had received SIGTERM by then, which torchrun sends to all ranks when one has failed.
    """

    rank: int
    code: int
    time: float
    terminated: bool = False

    def stopped(self, asked: bool) -> bool:
        """Return whether the rank stopped as it should.

        Args:
            asked: whether the launcher was asked to stop. A rank that had not yet installed its signal handlers is then
                killed by the signal, which also counts as stopped.
        """
        return self.code == EXIT_STOPPED or (asked and -self.code in STOP_SIGNALS)

    @property
    def status(self) -> int:
        """The exit status as a shell shows it: 128 + N for signal N."""
        return self.code if self.code >= 0 else 128 - self.code


def write_exit(logs: Path, rank: int, code: int | None, exited: float | None, terminated: float | None) -> None:
    """Write the record of a rank. `code` and `exited` are None while the rank is still ending."""
    record = {"code": code, "exited": exited, "terminated": terminated}
    write_text(exit_path(logs, rank), json.dumps(record), flush_to_disk=False)


def _read_record(path: Path, names: Sequence[str]) -> dict[str, Any]:
    """Read a record of numbers; raises FileNotFoundError or InvalidInputError, for example after a power cut."""
    record = parse_object(path.read_bytes())
    for name in names:
        if name not in record or record[name] is not None:
            field(record, name, float)
    return record


def read_exit(logs: Path, rank: int, code: int, noticed: float) -> RankExit:
    """Read how a rank ended.

    Args:
        code: exit status that torchrun saw. It counts if the supervisor was killed before it could record one.
        noticed: when torchrun saw it, in seconds since the epoch, rounded down as torchrun does. It counts in the same
            case.
    """
    failed = noticed + 1.0  # the end of that second, so that no rank seems to have failed before the one that ended it
    try:
        record = _read_record(exit_path(logs, rank), ("code", "exited", "terminated"))
    except (FileNotFoundError, InvalidInputError):
        # A supervisor that SIGTERM ends before it blocks signals leaves no record. torchrun sent that signal.
        record = {"code": None, "exited": None, "terminated": noticed if code == -signal.SIGTERM else None}
    if record["code"] is not None:
        code, failed = record["code"], record["exited"]
    terminated = record["terminated"]
    with suppress(FileNotFoundError, InvalidInputError):
        failure = _read_record(failure_path(logs, rank), ("time", "status"))
        failed = failure["time"]
        if code < 0 and terminated is not None and failed <= terminated:
            code = failure["status"]  # it was about to exit with this status when torchrun ended it
    return RankExit(rank, code, failed, terminated is not None and terminated < failed)


def first_failure(exits: Sequence[RankExit], asked: bool) -> RankExit:
    """Return the rank whose end explains the others'.

    A user error comes first, then a rank that had not received SIGTERM, then one that failed rather than stopped, then
    one that stopped by itself rather than by a signal, then one that a signal killed (except SIGABRT, which can end a
    rank that lost another), then the one that failed first.

    Args:
        exits: exits of all ranks that did not return 0.
        asked: whether the launcher was asked to stop. It then sent SIGTERM itself, which says nothing about a cause.
    """

    def precedence(rank: RankExit) -> tuple[bool, bool, bool, bool, bool, float]:
        killed = rank.code < 0 and -rank.code != signal.SIGABRT
        return (
            rank.code != EXIT_USER_ERROR,
            rank.terminated and not asked,
            rank.stopped(asked),
            rank.stopped(asked) and rank.code != EXIT_STOPPED,
            not killed,
            rank.time,
        )

    return min(exits, key=precedence)
