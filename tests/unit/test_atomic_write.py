"""A file or folder never appears under its name before it is complete, whenever the writer is stopped."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_rlvr.atomic_write import atomic_file, replace_folder, write_bytes, write_text


def test_a_file_has_its_name_only_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "outcome.node1"
    write_text(path, "old")
    with atomic_file(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_text() == "old"
        # A search for outcomes must not mistake the unfinished file for the outcome of another node.
        assert list(tmp_path.glob("outcome.*")) == [path]
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "status.json"
    write_bytes(path, b"old")
    with pytest.raises(KeyboardInterrupt), atomic_file(path) as file:
        file.write(b"half of the n")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_replaces_one_with_files_in_it(tmp_path: Path) -> None:
    for name in ("model", "model.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text(name)
    replace_folder(tmp_path / "model.partial", tmp_path / "model")
    assert [file.name for file in (tmp_path / "model").iterdir()] == ["model.partial"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]
