"""Hugging Face -> Megatron -> Hugging Face is bit-equal, whatever the layouts of the two conversions."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_rlvr.backend.model_folder import INDEX, read_tensor, tensor_files
from tests.conftest import ROOT, launch, make_small_model, run_trainer
from tests.families import make_family

PROGRAM = ROOT / "tools" / "convert_checkpoint.py"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("convert_checkpoint", PROGRAM)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def equal(first: Path, second: Path) -> bool:
    ours, theirs = tensor_files(first), tensor_files(second)
    return ours.keys() == theirs.keys() and all(
        read_tensor(ours[name], name).equal(read_tensor(theirs[name], name)) for name in ours
    )


def test_round_trip_in_one_process(tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = make_small_model(tmp_path / "source")
    (source / "generation_config.json").write_text("{}")
    checkpoint, out = tmp_path / "checkpoint", tmp_path / "out"
    assert tool.main(["to-megatron", str(source), str(checkpoint), "--verify"]) == 0
    shard = ["--shard-gib", "1e-5", "--model", str(source)]
    assert tool.main(["to-huggingface", str(checkpoint), str(out), "--verify", *shard]) == 0
    printed = capsys.readouterr().out
    assert printed.count("tensors are equal") == 2 and "peak memory of a process" in printed
    assert equal(source, out)
    assert {p.name for p in source.iterdir()} - {p.name for p in out.iterdir()} == {"model.safetensors"}
    assert (out / INDEX).is_file()
    # a loadable folder, not only equal files
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(out).state_dict()
    assert all(theirs[name].equal(t) for name, t in AutoModelForCausalLM.from_pretrained(source).state_dict().items())

    assert tool.main(["to-huggingface", str(checkpoint), str(out), *shard]) == 2
    assert "exists: remove it or name another output" in capsys.readouterr().err


def test_round_trip_through_two_layouts(tmp_path: Path) -> None:
    source = make_family(tmp_path / "source", "qwen2-tied-odd-vocabulary")
    checkpoint, out = str(tmp_path / "checkpoint"), str(tmp_path / "out")
    launch([str(PROGRAM), "to-megatron", str(source), checkpoint, "--pipeline", "2"], 2, check=True)
    options = ["--model", str(source), "--verify", "--tensor", "2"]
    launch([str(PROGRAM), "to-huggingface", checkpoint, out, *options], 2, check=True)
    assert equal(source, tmp_path / "out")


def test_a_run_s_checkpoint_is_its_export(tool: ModuleType, run_yaml: Path, small_model: Path, tmp_path: Path) -> None:
    run_trainer(run_yaml, "steps=1", "data.heldout=null")
    checkpoint, out = tmp_path / "run" / "checkpoints" / "step_1", tmp_path / "out"
    assert tool.main(["to-huggingface", str(checkpoint), str(out), "--model", str(small_model), "--verify"]) == 0
    assert equal(tmp_path / "run" / "huggingface", out) and not equal(small_model, out)


def test_bfloat16_stays_bfloat16(tool: ModuleType, tmp_path: Path) -> None:
    source = make_family(tmp_path / "source", "qwen2-untied")
    tensors = {name: t.bfloat16() for name, t in load_file(source / "model.safetensors").items()}
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    assert tool.main(["to-megatron", str(source), str(tmp_path / "checkpoint"), "--verify"]) == 0
    arguments = ["to-huggingface", str(tmp_path / "checkpoint"), str(tmp_path / "out"), "--model", str(source)]
    assert tool.main(arguments) == 0
    assert equal(source, tmp_path / "out")
    assert load_file(tmp_path / "out" / "model.safetensors")["lm_head.weight"].dtype is torch.bfloat16


def test_bad_input_is_one_line(tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = make_family(tmp_path / "source", "qwen2-tied")
    other = make_family(tmp_path / "other", "qwen2-tied", hidden_size=48)
    checkpoint = tmp_path / "checkpoint"
    assert tool.main(["to-megatron", str(source), str(checkpoint)]) == 0
    damaged = shutil.copytree(checkpoint, tmp_path / "damaged")
    next(damaged.glob("*.distcp")).unlink()
    (tmp_path / "nothing").mkdir()
    capsys.readouterr()
    for arguments, message in (
        (["to-huggingface", str(checkpoint), "x", "--model", str(other)], "hidden_size=32 instead of 48"),
        (["to-huggingface", str(damaged), "x", "--model", str(source)], "damaged cannot be read"),
        (["to-huggingface", str(tmp_path / "nothing"), "x", "--model", str(source)], "is no whole checkpoint"),
        (["to-huggingface", str(checkpoint), "x"], "needs --model"),
        (["to-megatron", str(tmp_path / "nothing"), "x"], "has no config.json"),
        (["to-megatron", str(source), "x", "--tensor", "2"], "= 2 does not divide the 1 processes"),
    ):
        assert tool.main(arguments) == 2, arguments
        line = capsys.readouterr().err
        assert message in line and line.startswith("error: ") and line.count("\n") == 1, line


def test_verification_finds_one_wrong_element(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_rlvr.backend import conversion

    source = make_family(tmp_path / "source", "llama-untied")
    load = conversion.load_weights

    def spoil(bridge, model, checkpoint) -> None:  # type: ignore[no-untyped-def]
        load(bridge, model, checkpoint)
        with torch.no_grad():
            model.decoder.layers[1].mlp.linear_fc2.weight[3, 5] += 1e-6

    monkeypatch.setattr(conversion, "load_weights", spoil)
    assert tool.main(["to-megatron", str(source), str(tmp_path / "checkpoint"), "--verify"]) == 2
    assert "model.layers.1.mlp.down_proj.weight differs" in capsys.readouterr().err
    assert not (tmp_path / "checkpoint").exists()
