"""Conversion from Hugging Face to Megatron and back is bit-equal, in any layout."""

from __future__ import annotations

import importlib.util
import json
import random
import re
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatron_rlvr.checksums import LIST, check_files, read_list
from megatron_rlvr.megatron.huggingface_config import read_config
from megatron_rlvr.weights.huggingface_folder import INDEX, read_tensor, tensor_files
from tests.families import FAMILIES, MIXTURES, make_family
from tests.processes import ROOT, fork, launch, run_trainer
from tests.small_model import make_small_model

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
    assert printed.count("tensors are equal") == 2 and "; peak memory " in printed
    assert equal(source, out)
    assert {p.name for p in source.iterdir()} - {p.name for p in out.iterdir()} == {"model.safetensors"}
    assert (out / INDEX).is_file()
    # transformers can also load the folder.
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(out).state_dict()
    assert all(theirs[name].equal(t) for name, t in AutoModelForCausalLM.from_pretrained(source).state_dict().items())

    assert tool.main(["to-huggingface", str(checkpoint), str(out), *shard]) == 2
    assert "exists: remove it or name another output" in capsys.readouterr().err


@pytest.fixture(scope="module")
def sharded(tool: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of every family: FAMILY, FAMILY-converted, and FAMILY-LAYOUT, which two processes have rewritten."""
    folder = tmp_path_factory.mktemp("sharded")
    for family in FAMILIES | MIXTURES:
        make_family(folder / family, family)
        assert tool.main(["to-megatron", str(folder / family), str(folder / f"{family}-converted"), "--verify"]) == 0
    jobs = [
        {"name": name, "layout": layout, "folders": [str(folder / family) for family in families]}
        for name, (layout, families) in SHARDED.items()
    ]
    fork([str(ROOT / "tests" / "sharded_weights.py"), *map(json.dumps, jobs)], 2)
    return folder


SHARDED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "tp2": ({"tensor": 2, "sequence": True}, [*FAMILIES]),
    "pp2": ({"pipeline": 2}, [*FAMILIES, *MIXTURES]),
    "tp2-ep2": ({"tensor": 2, "sequence": True, "expert": 2}, [*MIXTURES]),
}


@pytest.mark.parametrize("family", FAMILIES | MIXTURES)
def test_round_trip_through_every_layout(family: str, tool: ModuleType, sharded: Path, tmp_path: Path) -> None:
    """Converted to Megatron in one process, read and written in the layout, converted back to Hugging Face."""
    for name in (name for name, (_, families) in SHARDED.items() if family in families):
        checkpoint, out = sharded / f"{family}-{name}", tmp_path / name
        source = str(sharded / family)
        assert tool.main(["to-huggingface", str(checkpoint), str(out), "--model", source, "--verify"]) == 0
        assert equal(sharded / family, out)


OPTIONS: dict[str, Callable[[Path], list[str]]] = {
    "to-megatron": lambda model: [],
    "to-huggingface": lambda model: ["--model", str(model), "--shard-gib", "3e-5"],
}


class KilledError(BaseException):
    """Simulates a kill, because nothing catches it."""


# Of each kind of table. Kimi-K2 is DeepSeek-V3 with another name in config.json.
KILLED = {
    "qwen2-untied": {"num_hidden_layers": 4},
    "gemma3": {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "mixtral": {},
    "glm4-moe": {},
    "kimi-k2": {},
}


@pytest.mark.parametrize("family", KILLED)
def test_a_killed_conversion_resumes(
    family: str,
    tool: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from megatron_rlvr.weights import whole_weights

    source = make_family(tmp_path / "source", "deepseek-v3" if family == "kimi-k2" else family, **KILLED[family])
    if family == "kimi-k2":
        config = json.loads((source / "config.json").read_text()) | {"model_type": "kimi_k2"}
        (source / "config.json").write_text(json.dumps(config))
    before = whole_weights.WholeWeights.pieces
    requested: list[str] = []
    kill_at = -1

    def count(self: whole_weights.WholeWeights, name: str, weight: torch.Tensor) -> object:
        requested.append(name)
        if len(requested) == kill_at:
            raise KilledError
        return before(self, name, weight)

    monkeypatch.setattr(whole_weights.WholeWeights, "pieces", count)
    for direction, given in (("to-megatron", source), ("to-huggingface", tmp_path / "uninterrupted-to-megatron")):
        options = OPTIONS[direction](source)
        uninterrupted, out = (tmp_path / f"{name}-{direction}" for name in ("uninterrupted", "out"))
        requested, kill_at = [], -1
        assert tool.main([direction, str(given), str(uninterrupted), *options]) == 0
        weights = len(requested)
        requested, kill_at = [], weights * 2 // 3
        with pytest.raises(KilledError):
            tool.main([direction, str(given), str(out), *options])
        partial = out.with_name(f"{out.name}.partial")
        written = {f.name: f.stat().st_mtime_ns for f in partial.iterdir() if f.stat().st_size > 2000}
        assert len(written) > 1 and not out.exists()
        capsys.readouterr()
        verified = ["--verify"] if direction == "to-huggingface" else []
        assert tool.main([direction, str(given), str(out), *options, *verified]) == 0
        assert "continuing with" in capsys.readouterr().out
        kept = {f.name for f in out.iterdir() if written.get(f.name) == f.stat().st_mtime_ns}
        assert len(kept) > 1
        if direction == "to-megatron":
            assert len(requested) < kill_at + weights  # not all of the weights are requested again
            listed = read_list(out)
            assert listed is not None and any(name in listed for name in kept)
            check_files(out, listed)
        for file in uninterrupted.iterdir():
            if file.name not in ("common.pt", "run.json", ".metadata", LIST):
                assert file.read_bytes() == (out / file.name).read_bytes(), file.name
    assert equal(source, out)
    assert json.loads((out / "config.json").read_text()) == json.loads((source / "config.json").read_text())
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("direction", ["to-megatron", "to-huggingface"])
def test_a_full_disk(direction: str, tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A limit of 60 kB per file acts like a full disk. Once there is room, the conversion resumes."""
    source = make_family(tmp_path / "source", "qwen2-untied", vocab_size=1000)
    assert tool.main(["to-megatron", str(source), str(tmp_path / "checkpoint")]) == 0
    converted = str(source if direction == "to-megatron" else tmp_path / "checkpoint")
    arguments = [direction, converted, str(tmp_path / "out"), *OPTIONS[direction](source)]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    capsys.readouterr()
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, limits[1]))
    try:
        assert tool.main(arguments) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    line = capsys.readouterr().err
    assert re.fullmatch(r"error: \S+/out cannot be written: \[Errno 27\] File too large; free some .*\n", line), line
    assert tool.main(arguments) == 0
    assert "continuing with" in capsys.readouterr().out and not list(tmp_path.glob("*.partial"))


def test_another_input_starts_over(tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = make_family(tmp_path / "first", "qwen2-untied")
    second = make_family(tmp_path / "second", "llama-untied")
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "input.json").write_text(json.dumps({"folder": str(first), "files": {}}))
    (tmp_path / "out.partial" / "layer-0.record").write_bytes(b"of another model")
    assert tool.main(["to-megatron", str(second), str(tmp_path / "out"), "--verify"]) == 0
    assert "continuing" not in capsys.readouterr().out


def test_memory_holds_one_weight(tmp_path: Path) -> None:
    """A model of 198 MB, whose largest weight has 17 MB, is converted with less than 120 MB in both directions.

    Measured: 103 MB, six of these weights, with a peak of 434 MB of the process.
    """
    source = make_family(
        tmp_path / "source", "qwen2-untied", hidden_size=512, intermediate_size=4096, num_hidden_layers=7
    )
    assert (source / "model.safetensors").stat().st_size > 180e6
    checkpoint, out = str(tmp_path / "checkpoint"), str(tmp_path / "out")
    for arguments in (
        ["to-megatron", str(source), checkpoint],
        ["to-huggingface", checkpoint, out, "--model", str(source)],
    ):
        printed = launch([str(PROGRAM), *arguments, "--verify"], 1, check=True).stdout
        memory = re.search(r"peak memory (\S+) GiB, (\S+) GiB before the first weight", printed)
        assert memory is not None and 0 < float(memory[1]) - float(memory[2]) < 0.112, printed
    assert equal(source, tmp_path / "out")


def test_a_checkpoint_equals_the_export(tool: ModuleType, run_yaml: Path, small_model: Path, tmp_path: Path) -> None:
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


def test_conversion_keeps_every_bit_whatever_config_json_says(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = make_family(tmp_path / "source", "qwen2-tied")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    checkpoint, out = tmp_path / "checkpoint", tmp_path / "out"
    assert tool.main(["to-megatron", str(source), str(checkpoint), "--verify"]) == 0
    printed = capsys.readouterr().out
    assert "config.json says bfloat16, but the weights are float32: they are kept as float32" in printed
    back = ["to-huggingface", str(checkpoint), str(out), "--model", str(source), "--verify"]
    assert tool.main(back) == 0
    assert equal(source, out) and json.loads((out / "config.json").read_text())["dtype"] == "float32"

    assert tool.main([*back[:2], str(tmp_path / "rounded"), *back[3:], "--dtype", "bfloat16"]) == 0
    printed = capsys.readouterr().out
    assert "warning: weights in float32 are rounded to bfloat16" in printed and "are equal, as bfloat16" in printed
    rounded = load_file(tmp_path / "rounded" / "model.safetensors")
    exact = load_file(source / "model.safetensors")
    assert all(rounded[name].equal(tensor.bfloat16()) for name, tensor in exact.items())
    assert json.loads((tmp_path / "rounded" / "config.json").read_text())["dtype"] == "bfloat16"
    rounding = ["to-megatron", str(source), str(tmp_path / "narrow"), "--verify", "--dtype", "bfloat16"]
    assert tool.main(rounding) == 0
    printed = capsys.readouterr().out
    assert "warning: weights in float32 are rounded to bfloat16" in printed and "are equal, as bfloat16" in printed

    half = {name: tensor.half() for name, tensor in exact.items()}
    save_file(half, source / "model.safetensors", metadata={"format": "pt"})
    assert tool.main(["to-megatron", str(source), str(tmp_path / "half"), "--verify"]) == 0
    assert "the weights are float16: they are kept as float32" in capsys.readouterr().out


def test_good_and_bad_folders_of_other_programs(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Buffers of old versions are accepted with the values of config.json alone; nothing that counts is dropped."""
    source = make_family(tmp_path / "source", "llama3-tied")
    intact = load_file(source / "model.safetensors")
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](read_config(source), torch.device("cpu"))
    buffers = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": frequencies.clone() for layer in (0, 1)}
    good = intact | buffers | {"lm_head.weight": intact["model.embed_tokens.weight"].clone()}
    other_head = {"lm_head.weight": intact["model.embed_tokens.weight"].flip(0).contiguous()}
    nan = {"model.norm.weight": torch.full_like(intact["model.norm.weight"], torch.nan)}
    infinite = {"model.norm.weight": intact["model.norm.weight"].double() * 1e200}
    capsys.readouterr()
    for number, (change, message) in enumerate(
        (
            ({}, None),
            (other_head, "lm_head.weight differs from model.embed_tokens.weight: set it to false"),
            ({name: tensor * 2 for name, tensor in buffers.items()}, "with another rope_theta or scaling"),
            ({"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}, "q_proj.bias is not a tensor of llama"),
            (nan, "model.norm.weight has values that are NaN or infinite"),
            (infinite, "model.norm.weight has values that are NaN or infinite"),
        )
    ):
        save_file(good | change, source / "model.safetensors", metadata={"format": "pt"})
        target = tmp_path / f"checkpoint{number}"
        status = tool.main(["to-megatron", str(source), str(target), "--verify"])
        line = capsys.readouterr().err
        assert status == (0 if message is None else 2), line
        expected = re.escape(message) if message else ""
        assert re.fullmatch(f"error: .*{expected}.*\\n" if message else "", line), line
        assert target.exists() == (message is None) and not list(tmp_path.glob("*.partial"))


def test_a_flipped_byte_of_a_converted_checkpoint_is_named(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = make_family(tmp_path / "source", "qwen2-tied")
    checkpoint = tmp_path / "checkpoint"
    assert tool.main(["to-megatron", str(source), str(checkpoint)]) == 0
    rng = random.Random(5)
    for file in sorted(checkpoint.iterdir()):
        before = file.read_bytes()
        position = rng.randrange(len(before))
        file.write_bytes(before[:position] + bytes([before[position] ^ 16]) + before[position + 1 :])
        capsys.readouterr()
        assert tool.main(["to-huggingface", str(checkpoint), str(tmp_path / "out"), "--model", str(source)]) == 2
        line = capsys.readouterr().err
        assert line.startswith(f"error: {checkpoint} ") and line.count("\n") == 1, line
        assert not list(tmp_path.glob("out*"))
        file.write_bytes(before)
    edited = json.loads((source / "config.json").read_text()) | {"rope_parameters": {"rope_type": "default"}}
    edited["rope_parameters"]["rope_theta"] = 123.0
    other = shutil.copytree(source, tmp_path / "other")
    (other / "config.json").write_text(json.dumps(edited))
    assert tool.main(["to-huggingface", str(checkpoint), str(tmp_path / "out"), "--model", str(other)]) == 2
    assert "is a checkpoint of another model (rope={" in capsys.readouterr().err


def test_a_damaged_record_of_a_killed_conversion_is_written_again(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_rlvr.megatron import streamed_checkpoint

    source = make_family(tmp_path / "source", "qwen2-tied", num_hidden_layers=3)
    write, written = streamed_checkpoint._write_record, []

    def die(path: Path, record: Any) -> None:
        write(path, record)
        written.append(path)
        if len(written) == 3:
            raise KilledError

    monkeypatch.setattr(streamed_checkpoint, "_write_record", die)
    with pytest.raises(KilledError):
        tool.main(["to-megatron", str(source), str(tmp_path / "out")])
    monkeypatch.setattr(streamed_checkpoint, "_write_record", write)
    for path, data in zip(written, (b"", b"x" * 50, written[2].read_bytes()[:-1]), strict=True):
        path.write_bytes(data)
    assert tool.main(["to-megatron", str(source), str(tmp_path / "out"), "--verify"]) == 0


def test_bad_input_is_one_line(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source = make_family(tmp_path / "source", "qwen2-tied")
    other = make_family(tmp_path / "other", "qwen2-tied", hidden_size=48)
    checkpoint = tmp_path / "checkpoint"
    assert tool.main(["to-megatron", str(source), str(checkpoint)]) == 0
    damaged = shutil.copytree(checkpoint, tmp_path / "damaged")
    next(damaged.glob("*.distcp")).unlink()
    (tmp_path / "nothing").mkdir()
    cut = shutil.copytree(source, tmp_path / "cut")
    (cut / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes()[:-9])
    narrow = shutil.copytree(source, tmp_path / "narrow")
    shutil.copy(other / "config.json", narrow)
    llama = shutil.copytree(source, tmp_path / "llama")
    text = (source / "config.json").read_text().replace('"qwen2"', '"gemma3"')
    (llama / "config.json").write_text(text)
    capsys.readouterr()
    for arguments, message in (
        (["to-huggingface", str(checkpoint), "x", "--model", str(other)], "hidden_size=32 instead of 48"),
        (["to-huggingface", str(damaged), "x", "--model", str(source)], "damaged cannot be read"),
        (["to-huggingface", str(tmp_path / "nothing"), "x", "--model", str(source)], "is not a complete checkpoint"),
        (["to-huggingface", str(checkpoint), "x"], "needs --model"),
        (["to-megatron", str(tmp_path / "nothing"), "x"], "has no config.json"),
        (["to-megatron", str(cut), "x"], "cut/model.safetensors cannot be read"),
        (["to-megatron", str(narrow), "x"], "does not match its config.json"),
        (["to-megatron", str(llama), "x"], "model_type 'gemma3"),
        (["to-megatron", str(source), "x", "--shard-gib", "0"], "--shard-gib must be greater than 0"),
    ):
        assert tool.main(arguments) == 2, arguments
        line = capsys.readouterr().err
        assert message in line and line.startswith("error: ") and line.count("\n") == 1, line
        assert not list(tmp_path.glob("x*"))


def test_verification_finds_one_wrong_element(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_rlvr.megatron.streamed_checkpoint import StreamedLoad

    source = make_family(tmp_path / "source", "llama-untied")
    fill = StreamedLoad.fill

    def spoil(self: StreamedLoad, pieces: list[Any]) -> None:
        fill(self, pieces)
        if pieces[0].key == "decoder.layers.mlp.linear_fc2.weight" and pieces[0].global_offset[0] == 1:
            pieces[0].data[3, 5] += 1e-6

    monkeypatch.setattr(StreamedLoad, "fill", spoil)
    assert tool.main(["to-megatron", str(source), str(tmp_path / "checkpoint"), "--verify"]) == 2
    assert "model.layers.1.mlp.down_proj.weight differs" in capsys.readouterr().err
    assert [entry.name for entry in tmp_path.iterdir()] == ["source"]
