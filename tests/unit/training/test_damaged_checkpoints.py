"""A damaged checkpoint is named, and the one before it is loaded. Without one the run is refused."""

from __future__ import annotations

import json
import os
import random
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from megatron_rlvr.checksums import LIST, DamagedError, write_list
from megatron_rlvr.config import Config
from megatron_rlvr.errors import UserError
from megatron_rlvr.megatron import parallel
from megatron_rlvr.megatron.config import ModelConfig, ParallelConfig
from megatron_rlvr.training.checkpoint import Checkpoints
from megatron_rlvr.training.checkpoints_folder import faults
from megatron_rlvr.training.config import CheckpointConfig
from megatron_rlvr.training.policy import Policy
from megatron_rlvr.weights.checkpoint_folder import read_record


@pytest.fixture(scope="module")
def policy(small_model: Path) -> Iterator[Policy]:
    with parallel.parallel_groups(ParallelConfig(), seed=0) as layout:
        yield Policy(Config(model=ModelConfig(path=str(small_model), dtype="float32", layer_spec="local")), layout)


@pytest.fixture(autouse=True)
def libraries_do_not_warn() -> Iterator[None]:
    """As in a run, so that stderr has the lines of this project alone."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def fill(policy: Policy, value: float) -> None:
    with torch.no_grad():
        for parameter in policy.model_chunks[0].parameters():
            parameter.fill_(value)


def weights_are(policy: Policy, value: float) -> bool:
    return all(bool((parameter == value).all()) for parameter in policy.model_chunks[0].parameters())


@pytest.fixture(scope="module")
def written(policy: Policy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of steps 1 to 3, whose weights are all equal to the step."""
    folder = tmp_path_factory.mktemp("written") / "checkpoints"
    checkpoints = Checkpoints(folder, CheckpointConfig(keep=3))
    for step in (1, 2, 3):
        fill(policy, step)
        checkpoints.save(step, policy, {"tokens_seen": step}, {})
    return folder


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    return shutil.copytree(written, tmp_path / "checkpoints")


def load(policy: Policy, folder: Path, expected: int | None) -> Checkpoints:
    """Load the newest checkpoint over other weights, and check that it is the expected one."""
    checkpoints = Checkpoints(folder, CheckpointConfig(keep=2))
    fill(policy, -1.0)
    record = checkpoints.load_newest(policy)
    assert (record and record["step"]) == expected
    if record is not None:
        assert record["tokens_seen"] == expected and weights_are(policy, float(expected or 0))
    return checkpoints


def without_checksums(checkpoint: Path) -> dict:
    """Turn a checkpoint into one of an earlier version; returns its record."""
    (checkpoint / LIST).unlink()
    record = json.loads((checkpoint / "run.json").read_text())
    del record["checksums"]
    (checkpoint / "run.json").write_text(json.dumps(record))
    return record


@pytest.mark.parametrize("seed", range(4))
def test_any_flipped_byte_leads_to_the_checkpoint_before(
    seed: int, policy: Policy, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = random.Random(seed)
    newest = folder / "step_3"
    for file in sorted(newest.iterdir()):
        for _ in range(5):
            intact = bytearray(file.read_bytes())
            position, bit = rng.randrange(len(intact)), rng.randrange(8)
            file.write_bytes(intact[:position] + bytes([intact[position] ^ 1 << bit]) + intact[position + 1 :])
            load(policy, folder, expected=2)
            [line] = capsys.readouterr().err.splitlines()
            assert line.startswith(f"warning: {folder}: step_3 is damaged (") and line.endswith("from step_2"), line
            assert file.name == LIST or file.name in line, line
            file.write_bytes(intact)
    load(policy, folder, expected=3)
    assert capsys.readouterr().err == ""


def edit(**changes: object) -> Callable[[Path], None]:
    """Change entries of ``run.json``."""

    def make(checkpoint: Path) -> None:
        record = json.loads((checkpoint / "run.json").read_text())
        (checkpoint / "run.json").write_text(json.dumps(record | changes))

    return make


def write(text: str) -> Callable[[Path], None]:
    return lambda checkpoint: (checkpoint / "run.json").write_text(text)  # type: ignore[return-value]


def exchange(checkpoint: Path) -> None:
    other = checkpoint.with_name("step_1")
    (checkpoint / "__0_0.distcp").write_bytes((other / "__0_0.distcp").read_bytes())


def replace_by_link(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint)
    checkpoint.symlink_to("step_1")


def loop(checkpoint: Path) -> None:
    (checkpoint / "run.json").unlink()
    (checkpoint / "run.json").symlink_to("run.json")


METADATA: dict[str, Callable[[Path], object]] = {
    "a list": write("[]"),
    "a number": write("7"),
    "null": write("null"),
    "text": write('"run"'),
    "nothing": write(""),
    "bytes": lambda c: (c / "run.json").write_bytes(b"\x80\xff\x00"),
    "deep": write("[" * 100_000),
    "a long integer": write('{"step": ' + "9" * 5000 + "}"),
    "an empty object": write("{}"),
    "another step": edit(step=2),
    "a negative step": edit(step=-3),
    "a step as text": edit(step="3"),
    "a step as a float": edit(step=3.0),
    "true as step": edit(step=True),
    "no step": edit(step=None),
    "a huge step": edit(step=10**30),
    "a model as a list": edit(model=[]),
    "files as a list": edit(files=[1]),
    "a size as text": edit(files={"common.pt": "9"}),
    "a negative size": edit(files={"common.pt": -9}),
    "a file outside": edit(files={"../../x": 9}),
    "a file name with a null character": edit(files={"\0": 9}),
    "a time as text": edit(saved_at="yesterday"),
    "a score as a list": edit(score=[]),
    "no metadata": lambda c: (c / "run.json").unlink(),
    "metadata as a folder": lambda c: ((c / "run.json").unlink(), (c / "run.json").mkdir()),
    "a loop of links": loop,
    "a link to another checkpoint": replace_by_link,
    "an empty folder": lambda c: (shutil.rmtree(c), c.mkdir()),
    "a file": lambda c: (shutil.rmtree(c), c.write_text("")),
    "a dangling link": lambda c: (shutil.rmtree(c), c.symlink_to("nowhere")),
}


@pytest.mark.parametrize("old", [False, True], ids=["new", "old"])
@pytest.mark.parametrize("change", METADATA)
def test_malformed_metadata_is_damage(
    change: str, old: bool, policy: Policy, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of checkpoints with checksums, also if the list of checksums was written again, and of old ones."""
    if old:
        without_checksums(folder / "step_3")
    METADATA[change](folder / "step_3")
    load(policy, folder, expected=2)
    [line] = capsys.readouterr().err.splitlines()
    assert "step_3 is damaged (" in line and line.endswith("continuing from step_2"), line
    if not old and (folder / "step_3").is_dir() and (folder / "step_3" / "run.json").is_file():
        write_list(folder / "step_3", {})
        load(policy, folder, expected=2)


@pytest.mark.parametrize("name", ["common.pt", "metadata.json", ".metadata", "__0_0.distcp", "run.json", LIST])
@pytest.mark.parametrize("kind", ["missing", "cut", "empty"])
def test_incomplete_checkpoints_are_named(name: str, kind: str, policy: Policy, folder: Path, capsys) -> None:
    file = folder / "step_3" / name
    data = file.read_bytes()
    file.unlink()
    if kind != "missing":
        file.write_bytes(data[: len(data) // 2] if kind == "cut" else b"")
    load(policy, folder, expected=2)
    assert name in capsys.readouterr().err


def test_added_and_exchanged_files_are_named(policy: Policy, folder: Path, capsys) -> None:
    exchange(folder / "step_3")
    (folder / "step_2" / "__1_0.distcp").write_bytes(b"")
    load(policy, folder, expected=1)
    line = capsys.readouterr().err
    assert "step_3 is damaged (__0_0.distcp differs from its checksum)" in line
    assert f"step_2 is damaged (__1_0.distcp is not in {LIST})" in line and line.count("\n") == 1


def test_old_checkpoints_load_with_a_warning(policy: Policy, folder: Path, capsys) -> None:
    without_checksums(folder / "step_3")
    load(policy, folder, expected=3)
    assert capsys.readouterr().err == (
        f"warning: {folder}/step_3 has no checksums: if it is damaged, that may go unnoticed\n"
    )
    with (folder / "step_3" / ".metadata").open("r+b") as file:
        file.write(b"\0\0")
    load(policy, folder, expected=2)
    assert "step_3 is damaged (it cannot be read" in capsys.readouterr().err


def damage_all(folder: Path) -> None:
    for step in (1, 2, 3):
        (folder / f"step_{step}" / "common.pt").write_bytes(b"x")


def only_latest(folder: Path) -> None:
    for step in (1, 2, 3):
        shutil.rmtree(folder / f"step_{step}")


def only(name: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        (folder / "step_3").rename(folder / name)
        only_latest_without(folder)

    return make


def only_latest_without(folder: Path) -> None:
    (folder / "latest").unlink()
    for entry in (folder / "step_1", folder / "step_2", folder / "step_3"):
        shutil.rmtree(entry, ignore_errors=True)


def a_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("")


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (damage_all, ["step_3 is damaged (common.pt", "step_2 is damaged (common.pt", "step_1 is damaged (common.pt"]),
        (only_latest, ["latest names step_3, which is missing"]),
        (only("step_x"), ["step_x is not the name of a checkpoint"]),
        (only("step_-3"), ["step_-3 is not the name of a checkpoint"]),
        (only("step_03"), ["step_03 is not the name of a checkpoint"]),
        (only("step_3.damaged"), ["step_3.damaged was set aside"]),
        (a_file, ["it is not a folder"]),
    ],
)
def test_a_run_without_a_usable_checkpoint_is_refused(
    make: Callable[[Path], None], names: list[str], policy: Policy, folder: Path
) -> None:
    make(folder)
    with pytest.raises(UserError) as error:
        load(policy, folder, expected=None)
    assert all(name in str(error.value) for name in names) and "\n" not in str(error.value)
    assert "restore a checkpoint from a copy, or remove this folder to start from step 0" in str(error.value)


def test_a_run_without_checkpoints_begins(policy: Policy, folder: Path) -> None:
    """A run that was killed before or during its first save."""
    only_latest_without(folder)
    load(policy, folder, expected=None)
    (folder / "step_1.partial").mkdir()
    load(policy, folder, expected=None)
    shutil.rmtree(folder)
    load(policy, folder, expected=None)


@pytest.mark.parametrize("text", ["step_2", "step_99", "", "stfp_3", "\0", "step_3\n", "x" * 10_000, None])
def test_the_pointer_is_never_followed(text: str | None, policy: Policy, folder: Path, capsys) -> None:
    (folder / "latest").unlink()
    if text is not None:
        (folder / "latest").write_text(text)
    load(policy, folder, expected=3)
    expected = {
        "step_99": "latest names step_99, which is missing",
        "": "latest does not name a checkpoint",
        "stfp_3": "latest does not name a checkpoint",
        "\0": "latest does not name a checkpoint",
        "x" * 10_000: "latest does not name a checkpoint",
    }.get("step_2" if text is None else text)
    line = capsys.readouterr().err
    assert line == (f"warning: {folder}: {expected}: continuing from step_3\n" if expected else "")


def test_pipes_are_not_read(folder: Path) -> None:
    for path in (folder / "latest", folder / "step_3" / "run.json"):
        path.unlink()
        os.mkfifo(path)
    assert faults(folder) == {"latest": "latest does not name a checkpoint"}
    with pytest.raises(DamagedError, match=r"run\.json is not a regular file"):
        read_record(folder / "step_3")


def test_damaged_checkpoints_do_not_count_as_kept(policy: Policy, folder: Path) -> None:
    """Otherwise ``keep`` newest ones could all be damaged, and the one that the run continued from be deleted."""

    def names() -> set[str]:
        return {entry.name for entry in folder.iterdir()}

    (folder / "step_3" / "common.pt").write_bytes(b"x")
    checkpoints = load(policy, folder, expected=2)
    assert names() == {"latest", "step_1", "step_2", "step_3"}  # reading changes nothing
    shutil.rmtree(folder / "step_1")
    (folder / "step_3").rename(folder / "step_9")
    checkpoints._damaged = {9: "common.pt differs"}
    checkpoints.save(3, policy, {"tokens_seen": 3}, {})
    assert names() == {"latest", "step_2", "step_3", "step_9.damaged"}
    assert (folder / "latest").read_text() == "step_3"
    checkpoints.save(9, policy, {"tokens_seen": 9}, {})
    assert names() == {"latest", "step_3", "step_9"}


def test_the_newest_checkpoint_is_not_written_again(policy: Policy, folder: Path) -> None:
    """A kill between the removal of the old one and the rename of the new one would lose it."""
    checkpoints = load(policy, folder, expected=3)
    before = (folder / "step_3" / "run.json").stat().st_mtime_ns
    checkpoints.save(3, policy, {"tokens_seen": 3}, {})
    assert (folder / "step_3" / "run.json").stat().st_mtime_ns == before


def test_leftovers_of_a_killed_save_are_removed(policy: Policy, folder: Path) -> None:
    for name in ("step_2.partial", "step_7.partial", "step_2.replaced", "step_1.expired"):
        (folder / name).mkdir()
        (folder / name / "file").write_text("")
    checkpoints = load(policy, folder, expected=3)
    checkpoints.save(4, policy, {"tokens_seen": 4}, {})
    assert {entry.name for entry in folder.iterdir()} == {"latest", "step_3", "step_4"}
