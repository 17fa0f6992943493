"""The run directory before training: shared by the nodes, and not in use."""

from __future__ import annotations

import fcntl
from pathlib import Path

import pytest

from megatron_rlvr.cluster.node_checks import BadNodesError
from megatron_rlvr.cluster.run_directory_checks import check_shared, wait_for_lock
from megatron_rlvr.errors import UserError


def test_a_run_directory_that_is_not_shared_is_refused(tmp_path: Path) -> None:
    for name in ("n1", "n3"):
        (tmp_path / f"{name}.json").write_text("{}")
    check_shared(["n1", "n3"], tmp_path, 0.3)
    with pytest.raises(BadNodesError, match=r"n1 does not see what n2 wrote to .*") as caught:
        check_shared(["n1", "n2", "n3"], tmp_path, 0.3)
    assert caught.value.nodes == ["n2"]
    with pytest.raises(UserError, match=r"what n2, n4 wrote .*: choose a run_directory on a file system"):
        check_shared(["n1", "n2", "n4"], tmp_path, 0.3)


def test_the_preflight_waits_for_the_lock_of_an_earlier_attempt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wait_for_lock(tmp_path, 0.1)  # there is none
    with (tmp_path / ".lock").open("w+") as held:
        held.write("4711")
        held.flush()
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="in use by process 4711"):
            wait_for_lock(tmp_path, 0.1)
    wait_for_lock(tmp_path, 0.1)

    def no_locks(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    wait_for_lock(tmp_path, 0.1)
