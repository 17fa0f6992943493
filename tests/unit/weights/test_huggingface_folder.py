"""Hugging Face folders on disk: shards, index, and refused folders."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_rlvr.errors import UserError
from megatron_rlvr.weights.companions import check_companions
from megatron_rlvr.weights.huggingface_folder import INDEX, read_tensor, tensor_files, write_folder

TENSORS = {f"layer.{i}.weight": torch.randn(16, 8, generator=torch.Generator().manual_seed(i)) for i in range(5)}


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "config.json").write_text("{}")
    (tmp_path / "source" / "tokenizer_config.json").write_text("{}")
    (tmp_path / "source" / "notes.txt").write_text("not part of a model")
    count = write_folder(tmp_path / "model", iter(TENSORS.items()), tmp_path / "source", shard_bytes=2 * 16 * 8 * 4)
    assert count == 5
    return tmp_path / "model"


def test_shards_with_their_index(sharded: Path) -> None:
    names = {p.name for p in sharded.iterdir()}
    shards = {f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)}
    assert names == {*shards, INDEX, "config.json", "tokenizer_config.json"}
    index = json.loads((sharded / INDEX).read_text())
    assert index["metadata"]["total_size"] == 5 * 16 * 8 * 4
    files = tensor_files(sharded)
    assert files.keys() == TENSORS.keys()
    assert all(read_tensor(files[name], name).equal(tensor) for name, tensor in TENSORS.items())


def test_a_reused_buffer_is_copied(tmp_path: Path) -> None:
    def stream() -> Iterator[tuple[str, torch.Tensor]]:
        buffer = torch.empty(4)
        for i in range(3):
            buffer.fill_(i)
            yield f"t{i}", buffer

    (tmp_path / "source").mkdir()
    write_folder(tmp_path / "model", stream(), tmp_path / "source")
    files = tensor_files(tmp_path / "model")
    assert {str(f.name) for f in files.values()} == {"model.safetensors"}
    assert [read_tensor(files[f"t{i}"], f"t{i}").tolist() for i in range(3)] == [[float(i)] * 4 for i in range(3)]


@pytest.mark.parametrize("name", ["merges.txt", "tokenizer.model", "additional_chat_templates/a.jinja"])
@pytest.mark.parametrize("kind", ["dangling", "pipe", "loop"])
def test_a_file_that_an_export_cannot_copy_is_named_before_training(name: str, kind: str, tmp_path: Path) -> None:
    file = tmp_path / "source" / name
    file.parent.mkdir(parents=True)
    file.write_text("{}")
    check_companions(tmp_path / "source")
    file.unlink()
    os.mkfifo(file) if kind == "pipe" else file.symlink_to(file if kind == "loop" else "nowhere")
    with pytest.raises(UserError, match=rf"{file.name}.* cannot be read .*download it again, or remove it") as error:
        check_companions(tmp_path / "source")
    assert "\n" not in str(error.value)


def test_a_full_disk_does_not_change_an_existing_folder(sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_rlvr.weights import huggingface_folder

    save_file, calls = huggingface_folder.save_file, []

    def fill(*arguments: object, **options: object) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        save_file(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(huggingface_folder, "save_file", fill)
    before = {p.name: p.read_bytes() for p in sharded.iterdir()}
    with pytest.raises(UserError, match=r"model cannot be written: .*No space left"):
        write_folder(sharded, iter(TENSORS.items()), sharded.with_name("source"), shard_bytes=600)
    assert {p.name: p.read_bytes() for p in sharded.iterdir()} == before
    assert sorted(p.name for p in sharded.parent.iterdir()) == ["model", "source"]


def test_damaged_folders_are_refused(sharded: Path) -> None:
    second = sharded / "model-00002-of-00003.safetensors"
    data = second.read_bytes()
    second.write_bytes(data[:-7])
    with pytest.raises(UserError, match=r"model-00002-of-00003.safetensors cannot be read"):
        tensor_files(sharded)
    second.unlink()
    with pytest.raises(UserError, match=r"lacks 1 of its shards, such as model-00002-of-00003.safetensors"):
        tensor_files(sharded)
    second.write_bytes((sharded / "model-00003-of-00003.safetensors").read_bytes())
    with pytest.raises(UserError, match=r"lacks layer\.\d\.weight, which the index expects"):
        tensor_files(sharded)
    (sharded / INDEX).write_text("{")
    with pytest.raises(UserError, match=r"index.json is damaged"):
        tensor_files(sharded)
