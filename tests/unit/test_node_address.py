"""The address at which a node listens, and stores that listen there only."""

from __future__ import annotations

import datetime
import socket

import pytest

from megatron_rlvr import node_address as module
from megatron_rlvr.node_address import listening_store, node_address

TIMEOUT = datetime.timedelta(seconds=60)


@pytest.mark.parametrize(
    ("resolved", "variables", "expected"),
    [
        ("10.0.0.5", {"SLURM_JOB_ID": "1", "SLURM_NNODES": "1"}, "127.0.0.1"),
        ("10.0.0.5", {"SLURM_JOB_ID": "1", "SLURM_NNODES": "2"}, "10.0.0.5"),
        ("10.0.0.5", {}, "10.0.0.5"),
        # Debian gives a machine's own name 127.0.1.1. The interface that leads to the launching node is used then.
        ("127.0.1.1", {"SLURM_JOB_ID": "1", "SLURM_NNODES": "2", "SLURM_LAUNCH_NODE_IPADDR": "127.0.0.1"}, "127.0.0.1"),
        (None, {"SLURM_JOB_ID": "1", "SLURM_NNODES": "2"}, "127.0.0.1"),
    ],
)
def test_address(
    resolved: str | None, variables: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_NNODES", "SLURM_LAUNCH_NODE_IPADDR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)

    def resolve(name: str) -> str:
        if resolved is None:
            raise OSError("unknown host")
        return resolved

    monkeypatch.setattr(module.socket, "gethostbyname", resolve)
    assert node_address("n1") == expected


def test_a_store_listens_at_one_address_only() -> None:
    store = listening_store("127.0.0.1", 0, TIMEOUT)
    store.set("key", "value")
    with socket.create_connection(("127.0.0.1", store.port)):
        pass
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", store.port))
    with pytest.raises(OSError, match="Address already in use"):
        listening_store("127.0.0.1", store.port, TIMEOUT)
