"""Published folders with FP8 weights become folders for training, also after a kill."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_rlvr.errors import UserError
from megatron_rlvr.megatron.huggingface_config import read_config
from megatron_rlvr.weights import comparison, fp8, resumable_folder
from megatron_rlvr.weights.dequantization import dequantize_folder
from megatron_rlvr.weights.fp8_folder import quantize_folder
from megatron_rlvr.weights.huggingface_folder import read_tensor, tensor_files
from megatron_rlvr.weights.shape_checks import check_shapes
from tests.families import CHOICE_BIAS, make_family
from tools.convert_checkpoint import main as convert

Tensors = dict[str, torch.Tensor]
PROJECTION = "model.layers.1.self_attn.kv_a_proj_with_mqa.weight"
PREDICTION = "model.layers.2.eh_proj.weight"


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a layer for multi-token prediction, in FP8."""
    folder = tmp_path_factory.mktemp("published")
    changes = {"num_nextn_predict_layers": 1, "hidden_size": 160}
    quantize_folder(make_family(folder / "source", "deepseek-v3", **changes), folder / "fp8")
    tensors = load_file(folder / "fp8" / "model.safetensors")
    tensors = {
        name: t.bfloat16() if t.dtype is torch.float32 and not _stays(name) else t for name, t in tensors.items()
    }
    tensors[PREDICTION], tensors[f"{PREDICTION}_scale_inv"] = fp8.quantize(torch.randn(160, 320))
    save_file(tensors, folder / "fp8" / "model.safetensors", {"format": "pt"})
    return folder / "fp8"


def _stays(name: str) -> bool:
    return name.endswith(("_scale_inv", CHOICE_BIAS))


def changed(folder: Path, copy: Path, change: Callable[[Tensors], object]) -> Path:
    shutil.copytree(folder, copy)
    tensors = load_file(copy / "model.safetensors")
    change(tensors)
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    return copy


def test_training_names_the_conversion(published: Path) -> None:
    with pytest.raises(UserError, match=rf"or convert it with .* from-fp8 {published} {published}-bf16$"):
        read_config(published)


def test_values_and_dtypes(published: Path, tmp_path: Path) -> None:
    count, compared = dequantize_folder(published, tmp_path / "out", lambda _line: None, verify=True)
    found, stored = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", published))
    assert compared == len(found) and count == sum(name.endswith("_scale_inv") for name in stored)
    assert found.keys() == {name for name in stored if not name.endswith("_scale_inv")} and PREDICTION in found
    for name, tensor in found.items():
        expected = stored[name]
        if f"{name}_scale_inv" in stored:
            expected = fp8.dequantize(expected, stored[f"{name}_scale_inv"]).bfloat16()
        assert tensor.dtype is expected.dtype and tensor.equal(expected), name
    config = read_config(tmp_path / "out")
    assert config.dtype is torch.bfloat16
    checked = check_shapes(tensor_files(tmp_path / "out"), config)
    assert checked.dtypes == {torch.bfloat16} and checked.prediction == {PREDICTION}


def test_config_json_names_a_dtype_that_holds_every_weight(published: Path, tmp_path: Path) -> None:
    """transformers and SGLang round weights to the dtype of config.json."""

    def widen(tensors: Tensors) -> None:
        tensors["model.norm.weight"] = tensors["model.norm.weight"].float() + 1e-5

    mixed = changed(published, tmp_path / "mixed", widen)
    dequantize_folder(mixed, tmp_path / "out", lambda _line: None)
    assert read_config(tmp_path / "out").dtype is torch.float32
    quantize_folder(tmp_path / "out", tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["dtype"] == "float32"


def test_layers_for_multi_token_prediction_are_no_fault_of_a_conversion(
    published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dequantize_folder(published, tmp_path / "out", lambda _line: None)
    quantize_folder(tmp_path / "out", tmp_path / "fp8")
    assert "1 tensors for multi-token prediction are not trained" in capsys.readouterr().err
    assert convert(["to-megatron", str(tmp_path / "out"), str(tmp_path / "megatron"), "--verify"]) == 0


def test_a_killed_conversion_continues(published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    dequantize_folder(published, whole, lambda _line: None, 60_000)
    files = len(list(whole.glob("*.safetensors")))
    assert files > 3
    written: list[str] = []
    write = resumable_folder.write_shard

    def write_or_die(path: Path, *arguments: Any) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        write(path, *arguments)
        written.append(path.name)

    monkeypatch.setattr(resumable_folder, "write_shard", write_or_die)
    with pytest.raises(KeyboardInterrupt):
        dequantize_folder(published, resumed, lambda _line: None, 60_000)
    assert not resumed.exists()
    monkeypatch.setattr(
        resumable_folder, "write_shard", lambda path, *rest: (written.append(path.name), write(path, *rest))
    )
    lines: list[str] = []
    dequantize_folder(published, resumed, lines.append, 60_000)
    assert lines[0].startswith("continuing with") and len(written) == len(set(written)) == files
    ours, theirs = tensor_files(resumed), tensor_files(whole)
    assert ours.keys() == theirs.keys()
    assert all(read_tensor(ours[name], name).equal(read_tensor(theirs[name], name)) for name in ours)
    assert {path.name for path in resumed.iterdir()} == {path.name for path in whole.iterdir()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{PROJECTION}_scale_inv"), rf"{PROJECTION} \[28, 160\] needs scales .*\[1, 2\], found no"),
        (lambda t: t.update({f"{PROJECTION}_scale_inv": torch.ones(2, 1)}), r"found those of shape \[2, 1\]"),
        (
            lambda t: t.update({"x.weight_scale_inv": torch.ones(1, 1)}),
            "holds x.weight_scale_inv, but no quantized tensor",
        ),
        (lambda t: t.pop(PROJECTION), f"lacks {PROJECTION}, which its config.json describes"),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(3)}),
            r"has shape \[3\], but config.json describes \[160\]",
        ),
        (lambda t: t.update({"model.norm.weight": torch.ones(160).char()}), "has dtype I8: use the model before"),
        (lambda t: t[f"{PROJECTION}_scale_inv"].fill_(torch.inf), "values that are NaN or infinite"),
    ],
)
def test_damaged_folders_make_no_folder(
    change: Callable[[Tensors], object], message: str, published: Path, tmp_path: Path
) -> None:
    damaged = changed(published, tmp_path / "damaged", change)
    with pytest.raises(UserError, match=message) as raised:
        dequantize_folder(damaged, tmp_path / "out", lambda _line: None)
    assert "\n" not in str(raised.value) and not list(tmp_path.glob("out*"))


def test_a_conversion_that_writes_something_else_is_found(
    published: Path,
    small_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for direction, source in (("from-fp8", published), ("to-fp8", small_model)):
        assert convert([direction, str(source), str(tmp_path / f"good-{direction}"), "--verify"]) == 0
        assert "tensors are equal to those of" in capsys.readouterr().out
        with monkeypatch.context() as patch:
            patch.setattr(comparison, "bit_equal", lambda _a, _b: False)
            assert convert([direction, str(source), str(tmp_path / f"bad-{direction}"), "--verify"]) == 2
        assert "verification failed: " in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir() if path.name.startswith("bad")} == set()


@pytest.mark.parametrize(
    ("direction", "option"),
    [
        *(("to-fp8", ["--dtype", "bfloat16"]), ("to-peft", ["--shard-gib", "1"]), ("from-fp8", ["--model", "x"])),
        ("to-megatron", ["--shard-gib", "2"]),
    ],
)
def test_an_option_without_effect_is_refused(
    direction: str, option: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert([direction, str(tmp_path / "a"), str(tmp_path / "b"), *option]) == 2
    assert f"{direction} takes " in (said := capsys.readouterr().err) and f"but not {option[0]}: leave it out" in said


@pytest.mark.parametrize("own", [None, {"quant_method": "awq"}, {"quant_method": "fp8", "weight_block_size": [64, 64]}])
def test_other_quantizations_are_refused(own: Any, published: Path, tmp_path: Path) -> None:
    folder = changed(published, tmp_path / "other", lambda _tensors: None)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": own}))
    with pytest.raises(UserError, match="is not that of FP8 weights in blocks of 128 x 128"):
        dequantize_folder(folder, tmp_path / "out", lambda _line: None)
