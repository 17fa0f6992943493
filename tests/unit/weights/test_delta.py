"""Deltas between two versions of weights: every bit of the result, their size, and deltas that do not fit."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest
import torch

from megatron_rlvr.checksums import DamagedError
from megatron_rlvr.errors import UserError
from megatron_rlvr.weights import fp8
from megatron_rlvr.weights.delta import Delta, apply, apply_delta, encode, read_delta, write_delta
from megatron_rlvr.weights.huggingface_folder import write_folder

DTYPES = (torch.bfloat16, torch.float32, torch.float8_e4m3fn)


def _random(seed: int, *shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _changed(tensor: torch.Tensor, share: float, seed: int = 0) -> torch.Tensor:
    """Flip the lowest bit of a share of the elements."""
    chosen = torch.rand(tensor.shape, generator=torch.Generator().manual_seed(seed)) < share
    bits = tensor.clone().view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.itemsize])
    bits[chosen] ^= 1
    return bits.view(tensor.dtype)


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("share", [0.0, 1e-4, 3e-3, 0.03, 0.3, 1.0])
def test_every_bit_of_the_result(share: float, dtype: torch.dtype) -> None:
    old = _random(1, 300, 200, dtype=dtype)
    new = _changed(old, share, seed=2)
    entries, count = encode("w", old, new)
    assert count == (old.view(torch.uint8) != new.view(torch.uint8)).sum()  # one byte of each changed element
    result = old.clone()
    if entries:
        apply("w", result, entries)
    assert _bytes(result) == _bytes(new)
    assert sum(entry.nbytes for entry in entries.values()) <= new.nbytes
    if dtype == torch.bfloat16 and share == 0.03:  # one byte for the gap and two for the value, of two per element
        assert sum(entry.nbytes for entry in entries.values()) == pytest.approx(0.03 * 1.5 * new.nbytes, rel=0.1)
        assert "w:jumps" in entries  # a few gaps of 255 and more


@pytest.mark.parametrize("places", [[0], [254], [255], [256], [0, 255], [0, 256], [511], [0, 1, 999], [999]])
def test_gaps_around_the_longest_short_one(places: list[int]) -> None:
    old = torch.zeros(1000, dtype=torch.bfloat16)
    new = old.clone()
    new[places] = 1.0
    entries, count = encode("w", old, new)
    apply("w", result := old.clone(), entries)
    assert count == len(places) and torch.equal(result, new)


def test_zeros_of_either_sign_and_nan_are_bits() -> None:
    old = torch.tensor([0.0, float("nan"), 1.0, 2.0] * 50, dtype=torch.bfloat16)
    new = old.clone()
    new[0] = -0.0
    entries, count = encode("w", old, new)
    apply("w", result := old.clone(), entries)
    assert count == 1 and _bytes(result) == _bytes(new) != _bytes(old)


def test_entries_that_do_not_fit_a_tensor() -> None:
    old = _random(1, 64, 64)
    entries, _ = encode("w", old, _changed(old, 0.05))
    with pytest.raises(ValueError, match="changes outside of the tensor"):
        apply("w", old[:1].clone(), entries)
    with pytest.raises(ValueError, match="inconsistent"):
        apply("w", old.clone(), entries | {"w:values": entries["w:values"][1:]})
    with pytest.raises(ValueError, match="inconsistent"):
        apply("w", old.float(), entries)
    with pytest.raises(ValueError, match="changes outside"):
        apply("w", old.clone(), entries | {"w:gaps": torch.full_like(entries["w:gaps"], 255)} | _jumps(entries, -300))
    with pytest.raises(ValueError, match=r"w was torch.bfloat16 \[64, 64\] and is torch.float32"):
        encode("w", old, old.float())
    with pytest.raises(ValueError, match=r"w is torch.bfloat16 \[64, 64\] in the base"):
        apply("w", old, {"w:whole": _random(1, 32)})


def _jumps(entries: dict[str, torch.Tensor], value: int) -> dict[str, torch.Tensor]:
    return {"w:jumps": torch.full((len(entries["w:gaps"]),), value)}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "config.json").write_text('{"dtype": "bfloat16"}')
    write_folder(tmp_path / "base", iter(_weights().items()), tmp_path / "source", shard_bytes=30_000)
    return tmp_path / "base"


def _weights() -> dict[str, torch.Tensor]:
    return {f"layer.{i}.weight": _random(i, 64, 128) for i in range(5)} | {"norm.weight": _random(9, 64)}


def test_fp8_blocks_with_their_scales_and_scalars(base: Path, tmp_path: Path) -> None:
    weights = {"layers.0.mlp.up_proj.weight": _random(1, 200, 300), "norm.weight": _random(2, 30)}
    weights["scale"] = torch.tensor(3.0)

    def write(folder: str) -> None:
        tensors = fp8.quantized(weights.items())
        write_folder(tmp_path / folder, tensors, tmp_path / "source", quantization=fp8.QUANTIZATION_CONFIG)

    write("old")
    weights = {name: tensor * 1.001 for name, tensor in weights.items()}
    write("new")
    about = write_delta(tmp_path / "delta", tmp_path / "old", fp8.quantized(weights.items()), Delta("c", 1, 2))
    assert about.elements == 200 * 300 + 2 * 3 + 30 + 1 and 0 < about.changed < about.elements
    apply_delta(tmp_path / "result", tmp_path / "old", tmp_path / "delta")
    assert _digests(tmp_path / "result") == _digests(tmp_path / "new") != _digests(tmp_path / "old")


def _digests(folder: Path) -> dict[str, str]:
    files = [file for file in folder.iterdir() if file.name != "SHA256SUMS"]
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_the_result_has_the_files_of_a_full_export(base: Path, tmp_path: Path) -> None:
    new = _weights()
    for name in ("layer.0.weight", "layer.3.weight"):
        new[name] = _changed(new[name], 0.03)
    about = write_delta(tmp_path / "delta", base, new.items(), Delta("c", 4, 5))
    assert about == read_delta(tmp_path / "delta")
    assert (about.chain, about.base, about.version, about.elements) == ("c", 4, 5, 5 * 64 * 128 + 64)
    assert about.changed == sum(int((new[n] != t).sum()) for n, t in _weights().items()) > 400
    assert about.nbytes < 0.05 * 2 * about.elements
    before = _digests(base)
    apply_delta(tmp_path / "result", base, tmp_path / "delta")
    write_folder(tmp_path / "full", iter(new.items()), tmp_path / "source", shard_bytes=30_000)
    assert _digests(tmp_path / "result") == _digests(tmp_path / "full") != before
    assert _digests(base) == before
    # Files without changes take no space of their own.
    shared = [f.name for f in base.iterdir() if f.samefile(tmp_path / "result" / f.name)]
    assert shared == [f.name for f in base.glob("*.safetensors") if not (tmp_path / "delta" / f.name).exists()] != []


@pytest.mark.parametrize("damage", ["bit", "truncated", "missing", "extra", "about", "no checksums"])
def test_a_damaged_delta_is_found(damage: str, base: Path, tmp_path: Path) -> None:
    delta = tmp_path / "delta"
    write_delta(delta, base, [(n, _changed(t, 0.05)) for n, t in _weights().items()], Delta("c", 4, 5))
    file = sorted(delta.glob("*.safetensors"))[0]
    data = file.read_bytes()
    if damage == "bit":
        file.write_bytes(data[:-5] + bytes([data[-5] ^ 1]) + data[-4:])
    elif damage == "truncated":
        file.write_bytes(data[:-1])
    elif damage == "missing":
        file.unlink()
    elif damage == "extra":
        shutil.copy(file, delta / "more.safetensors")
    elif damage == "about":
        about = (delta / "delta.json").read_text()
        (delta / "delta.json").write_text(about.replace('"base": 4', '"base": 3'))
    else:
        (delta / "SHA256SUMS").unlink()
    with pytest.raises(DamagedError):
        read_delta(delta)


def test_a_delta_of_another_model_leaves_no_folder(base: Path, tmp_path: Path) -> None:
    other = {name: _random(7, 8, 8) for name in _weights()}
    write_folder(tmp_path / "other", iter(other.items()), tmp_path / "source", shard_bytes=30_000)
    write_delta(tmp_path / "delta", base, [(n, _changed(t, 0.05)) for n, t in _weights().items()], Delta("c", 4, 5))
    with pytest.raises(DamagedError, match="does not fit its base"):
        apply_delta(tmp_path / "result", tmp_path / "other", tmp_path / "delta")
    with pytest.raises(ValueError, match=r"the export lacks norm\.weight"):
        write_delta(tmp_path / "short", base, list(_weights().items())[:-1], Delta("c", 4, 5))
    assert not [path.name for path in tmp_path.iterdir() if "result" in path.name or "short" in path.name]


def test_a_full_disk_is_a_user_error(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("megatron_rlvr.weights.delta.save_file", fill)
    with pytest.raises(UserError, match=r"delta cannot be written: .*No space left on device"):
        write_delta(tmp_path / "delta", base, [(n, t + 1) for n, t in _weights().items()], Delta("c", 4, 5))
    assert not [path.name for path in tmp_path.iterdir() if "delta" in path.name]
