"""Checksums of a folder find every change of it."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_rlvr import checksums
from megatron_rlvr.checksums import LIST, DamagedError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "folder"
    (path / "inner").mkdir(parents=True)
    with checksums.hashing_file(path / "data") as file:
        for block in (b"abc", bytearray(b"defg"), memoryview(b"\0" * 5000)):
            assert file.write(block) == len(block)
        assert file.tell() == 5007
    (path / "inner" / "text").write_text("text\n")
    (path / "empty").write_bytes(b"")
    (path / ".hidden").write_bytes(b"\x80\x02")
    checksums.write_list(path, {"data": file.digest()})
    return path


def damage(path: Path) -> str | None:
    """What is wrong with a folder; None if it is intact."""
    try:
        listed = checksums.read_list(path)
        if listed is None:
            return "no list"
        checksums.check_files(path, listed)
    except DamagedError as error:
        return str(error)
    return None


def test_the_list_is_that_of_sha256sum(folder: Path) -> None:
    assert damage(folder) is None
    assert subprocess.run(["sha256sum", "--check", "--strict", LIST], cwd=folder, capture_output=True).returncode == 0
    names = sorted((".hidden", "data", "empty", "inner/text"))
    expected = subprocess.run(["sha256sum", *names], cwd=folder, capture_output=True, text=True, check=True).stdout
    assert (folder / LIST).read_text() == expected


@pytest.mark.parametrize("seed", range(3))
def test_every_flipped_byte_is_found(folder: Path, seed: int) -> None:
    """All bytes of the list and of the short files, and some of the long one."""
    rng = random.Random(seed)
    files = [folder / name for name in (LIST, ".hidden", "inner/text", "data")]
    for file in files:
        intact = file.read_bytes()
        for position in range(len(intact)) if len(intact) < 1000 else rng.sample(range(len(intact)), 20):
            changed = bytearray(intact)
            changed[position] ^= 1 << rng.randrange(8) if seed else 32  # 32 exchanges lower and upper case
            file.write_bytes(changed)
            assert damage(folder), (file, position)
        file.write_bytes(intact)
    assert damage(folder) is None


def exchange(folder: Path) -> None:
    (folder / "data").rename(folder / "kept")
    (folder / "inner" / "text").rename(folder / "data")
    (folder / "kept").rename(folder / "inner" / "text")


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda f: (f / "empty").unlink(), "empty is missing"),
    "added": (lambda f: (f / "inner" / "more").touch(), "inner/more is not in SHA256SUMS"),
    "cut": (lambda f: os.truncate(f / "data", 5006), "data differs from its checksum"),
    "longer": (lambda f: os.truncate(f / "data", 5008), "data differs from its checksum"),
    "zero length": (lambda f: os.truncate(f / "inner" / "text", 0), "inner/text differs from its checksum"),
    "exchanged": (exchange, "data differs from its checksum"),
    "a folder instead of a file": (lambda f: ((f / "empty").unlink(), (f / "empty").mkdir()), "empty is missing"),
    "a pipe": (lambda f: ((f / "empty").unlink(), os.mkfifo(f / "empty")), "empty cannot be read (not a regular file)"),
    "a device": (
        lambda f: ((f / "empty").unlink(), (f / "empty").symlink_to("/dev/zero")),
        "empty cannot be read (not a regular file)",
    ),
    "a dangling link": (lambda f: ((f / "empty").unlink(), (f / "empty").symlink_to("x")), "empty cannot be read"),
    "an empty list": (lambda f: os.truncate(f / LIST, 0), ".hidden is not in SHA256SUMS"),
    "a list without its last line": (
        lambda f: (f / LIST).write_text("".join((f / LIST).read_text().splitlines(keepends=True)[:-1])),
        "inner/text is not in SHA256SUMS",
    ),
    "a cut list": (lambda f: os.truncate(f / LIST, 100), "SHA256SUMS is damaged"),
    "a name twice": (lambda f: (f / LIST).write_text((f / LIST).read_text() * 2), "SHA256SUMS names a file twice"),
    "a list of bytes": (lambda f: (f / LIST).write_bytes(b"\xff\xfe"), "SHA256SUMS cannot be read"),
    "carriage returns": (
        lambda f: (f / LIST).write_bytes((f / LIST).read_bytes().replace(b"\n", b"\r\n")),
        "SHA256SUMS is damaged",
    ),
    "a link as list": (lambda f: ((f / LIST).unlink(), (f / LIST).symlink_to("/dev/zero")), "SHA256SUMS is damaged"),
    "no list": (lambda f: (f / LIST).unlink(), "no list"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_of_a_folder_are_named(folder: Path, change: str) -> None:
    make, expected = CHANGES[change]
    make(folder)
    found = damage(folder)
    assert found is not None and found.startswith(expected) and "\n" not in found, found


def test_a_copy_is_intact(folder: Path, tmp_path: Path) -> None:
    assert damage(shutil.copytree(folder, tmp_path / "copy")) is None


def test_a_write_that_was_lost_is_an_error(tmp_path: Path) -> None:
    def write() -> None:
        with checksums.hashing_file(tmp_path / "data") as file:
            file.write(b"abcdef")
            file.flush()
            os.truncate(tmp_path / "data", 2)

    with pytest.raises(OSError, match="data has 2 bytes after 6 were written"):
        write()
