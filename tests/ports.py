"""Ports that tests name in advance. Where a process may choose its own, let it listen at port 0 instead."""

from __future__ import annotations

import contextlib
import random
import socket
from collections.abc import Iterator, Sequence

_SINGLE_PORTS = range(10000, 12000)  # below the ports of virtual Slurm clusters and of jobs


@contextlib.contextmanager
def reserved_block(blocks: Sequence[range]) -> Iterator[range]:
    """Yield one of these blocks of ports, in which nothing listens, and which no other caller on this machine gets.

    A port that was merely free when the test looked may be taken before the test's process listens there. The blocks
    have to be below the ports that the system assigns to connections (32768 on Linux).

    Raises:
        RuntimeError: if every block is in use.
    """
    for block in random.Random().sample(list(blocks), len(blocks)):
        with contextlib.ExitStack() as stack:
            reservation = stack.enter_context(socket.socket(socket.AF_UNIX))
            try:
                reservation.bind(f"\0ports-{block.start}")  # ends with this process, and leaves no file
                with contextlib.ExitStack() as probes:  # what a test process that was killed may have left
                    for port in block:
                        probes.enter_context(socket.socket()).bind(("", port))
            except OSError:
                continue
            yield block
            return
    raise RuntimeError(f"{len(blocks)} blocks of ports are in use on this machine")


@contextlib.contextmanager
def reserved_port() -> Iterator[int]:
    """Yield a single port; see `reserved_block`."""
    with reserved_block([range(port, port + 1) for port in _SINGLE_PORTS]) as block:
        yield block.start
