"""Which address of this machine a job's own servers and stores listen at: only one that its nodes need."""

from __future__ import annotations

import datetime
import ipaddress
import os
import socket
from typing import Any

LOOPBACK = "127.0.0.1"


def node_address(name: str) -> str:
    """Return the IPv4 address at which the other nodes of this job reach this node.

    That is the loopback address in a job of one node. Otherwise it is the address of the node's name. Some systems give
    a machine's own name the loopback address, which is of no use to others. Then it is the address from which this node
    reaches the first node of its Slurm job.

    Args:
        name: name of this node.
    """
    if int(os.environ.get("SLURM_NNODES") or 1) == 1 and "SLURM_JOB_ID" in os.environ:
        return LOOPBACK
    try:
        address = socket.gethostbyname(name)
    except OSError:
        address = LOOPBACK
    launcher = os.environ.get("SLURM_LAUNCH_NODE_IPADDR", "")
    if ipaddress.ip_address(address).is_loopback and launcher:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect((launcher, 1))  # sends nothing, but chooses the interface
                return str(probe.getsockname()[0])
            except OSError:
                pass
    return address


def resolves_to(name: str, address: str) -> bool:
    """Whether a host name leads to this address on this machine."""
    try:
        return socket.gethostbyname(name) == address
    except OSError:
        return False


def listening_store(address: str, port: int, timeout: datetime.timedelta, **options: Any) -> Any:
    """Return a TCPStore that listens at one address. torch's own listens at all addresses of the machine.

    Args:
        address: host name or address of this machine.
        port: port to listen at; 0 chooses a free one.
        timeout: deadline of the store's operations.
        options: further arguments of `torch.distributed.TCPStore`.

    Raises:
        OSError: if the port is taken.
    """
    import torch.distributed as dist

    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address, port))
        listener.listen(4096)
        port = listener.getsockname()[1]
        # The store owns a duplicate, so that this one can be closed whatever happens.
        return dist.TCPStore(
            address,
            port,
            is_master=True,
            timeout=timeout,
            master_listen_fd=os.dup(listener.fileno()),
            wait_for_workers=False,
            **options,
        )
