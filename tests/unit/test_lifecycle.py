"""The run directory's lock."""

from __future__ import annotations

import fcntl
from pathlib import Path

import pytest

from megatron_rlvr.errors import UserError
from megatron_rlvr.lifecycle import locked_run_directory


def test_a_run_directory_has_one_owner(tmp_path: Path) -> None:
    with (
        locked_run_directory(tmp_path / "run"),
        pytest.raises(UserError, match="is in use by process"),
        locked_run_directory(tmp_path / "run"),
    ):
        pass
    with locked_run_directory(tmp_path / "run"):
        pass


def test_a_file_system_without_locks_is_not_another_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def flock(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    with locked_run_directory(tmp_path / "run") as directory:
        assert directory.is_dir()
    assert (
        "has no locks (Function not implemented): make sure that no other run writes there" in capsys.readouterr().err
    )
