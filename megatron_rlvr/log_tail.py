"""Why a process ended, from the end of its log."""

from __future__ import annotations

import re
from pathlib import Path

_TAIL_BYTES = 128 * 1024
# The last line of a traceback, with or without the rank that torch puts in front, or one of the program's own errors.
_ERROR = re.compile(r"^(\[rank\d+\]: ?)?(error( \(rank \d+\))?: |[\w.]*(Error|Exception|Interrupt)\b)")


def last_error(log: Path) -> str:
    """Return the last line of a log that names an error, or its last line if none does.

    Only the last 128 KiB are read. For a missing or empty log, the returned line says so.
    """
    try:
        with log.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - _TAIL_BYTES))
            text = file.read().decode(errors="replace")
    except OSError:
        return "it left no log"
    return error_line(text) or "its log is empty"


def error_line(text: str) -> str:
    """Return the last line of a text that names an error, or its last line if none does; "" for an empty text."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if _ERROR.match(line)]
    return (errors or lines or [""])[-1]
