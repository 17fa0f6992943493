"""The process groups of a job."""

from __future__ import annotations

import os

import psutil
import pytest

from megatron_rlvr.megatron import parallel
from megatron_rlvr.megatron.config import ParallelConfig


def open_to_all() -> set[int]:
    """The ports of this process that listen on every interface."""
    connections = psutil.Process().net_connections()
    return {c.laddr.port for c in connections if c.status == psutil.CONN_LISTEN and c.laddr.ip in ("0.0.0.0", "::")}


def test_a_process_without_torchrun_can_form_a_job_repeatedly(monkeypatch: pytest.MonkeyPatch) -> None:
    """It changes no environment variable, which its children would inherit, and needs no port for a rendezvous."""
    monkeypatch.delenv("RANK", raising=False)
    variables, ports = dict(os.environ), open_to_all()
    for _ in range(2):
        with parallel.parallel_groups(ParallelConfig(), seed=0) as layout:
            assert (layout.rank, layout.world_size, layout.is_leader) == (0, 1, True)
            assert dict(os.environ) == variables
            assert open_to_all() <= ports
