"""Runs that go on with other settings, more steps, or from the weights of another run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from megatron_rlvr.telemetry.metrics import deterministic, read_metrics
from megatron_rlvr.telemetry.samples import read_samples
from megatron_rlvr.train import main
from tests.processes import ROOT, fork, run_trainer


def records(run: Path) -> list[dict[str, float]]:
    return [deterministic(record) for record in read_metrics(run)]


def test_a_run_goes_on_with_other_settings_and_more_steps(
    run_yaml: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = [str(run_yaml), "data.heldout=null", "checkpoint.export_huggingface=false"]
    decay = ["optimizer.min_learning_rate=1e-4"]
    assert main([*common, *decay, "steps=4", "checkpoint.keep=9"]) == 0
    first = records(tmp_path / "run")

    # The schedules end where they ended, and stay there.
    assert main([*common, *decay, "steps=6"]) == 0
    assert "total_steps=4 is less than steps=6" in capsys.readouterr().err
    longer = records(tmp_path / "run")
    assert longer[:4] == first
    assert [r["clip/lower_intercept"] for r in longer[4:]] == pytest.approx([0.2, 0.2], abs=1e-12)
    assert [r["lr"] for r in longer[3:]] == pytest.approx([1e-4] * 3)

    # A change needs the flag.
    change = ["algorithm.schedule.name=oscillatory-decay", "optimizer.learning_rate=2e-3", "steps=8"]
    assert main([*common, *decay, *change]) == 2
    assert "resume.allow=[algorithm.schedule,optimizer.learning_rate]" in capsys.readouterr().err
    allow = "resume.allow=[algorithm.schedule,optimizer.learning_rate,optimizer.decay_steps]"
    assert main([*common, *decay, *change, "optimizer.decay_steps=8", allow]) == 0
    changed = records(tmp_path / "run")
    assert changed[:6] == longer and len(changed) == 8
    assert changed[6]["control/band_low"] == pytest.approx(0.2 * first[0]["entropy"])
    assert changed[6]["lr"] > 1e-4
    history = [json.loads(line) for line in (tmp_path / "run" / "config_history.jsonl").read_text().splitlines()]
    assert {(r["step"], r["key"]) for r in history} >= {(4, "steps"), (6, "algorithm.schedule.name")}


def test_a_new_run_starts_from_another_one(
    run_yaml: Path, small_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = [str(run_yaml), "algorithm.schedule.name=constant", "data.heldout=null", "checkpoint.keep=9"]
    assert main([*common, "steps=5"]) == 0
    source, target = tmp_path / "run", tmp_path / "second"

    # The optimizer state comes along: with the prompts and samples of other steps, only weights and moments are equal.
    start = f"checkpoint.start_from={source / 'checkpoints' / 'step_3'}"
    assert main([*common, "steps=1", f"run_directory={target}", start]) == 0
    said = capsys.readouterr().err
    assert f"starting from {source}/checkpoints/step_3: its weights and optimizer state" in said
    weights_only = [
        *common,
        "steps=1",
        f"run_directory={tmp_path / 'third'}",
        start,
        "checkpoint.start_optimizer=false",
    ]
    assert main(weights_only) == 0
    assert "its weights and a fresh optimizer" in capsys.readouterr().err
    second, third = records(target)[0], records(tmp_path / "third")[0]
    assert second["entropy"] == third["entropy"] != records(source)[0]["entropy"]
    after = [load_file(run / "huggingface" / "model.safetensors") for run in (target, tmp_path / "third")]
    assert any(not after[0][name].equal(after[1][name]) for name in after[0])

    # The run goes on from its own checkpoints, and another layout starts from the same weights.
    assert main([*common, "steps=2", f"run_directory={target}", start]) == 0
    assert "starting from" not in capsys.readouterr().err
    assert len(records(target)) == 2
    other = [*common, "steps=1", f"run_directory={tmp_path / 'fourth'}", start, "parallel.distributed_optimizer=true"]
    assert main(other) == 2
    assert "or set checkpoint.start_optimizer=false" in capsys.readouterr().err
    assert main([*other, "checkpoint.start_optimizer=false"]) == 0
    run_trainer(*common, "steps=2", f"run_directory={tmp_path / 'layout'}", start, "parallel.tensor=2", processes=4)
    for mine, theirs in zip(records(target), records(tmp_path / "layout"), strict=True):
        for name in ("reward", "entropy", "grad_norm"):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-4), name
    # Rank 0 has the samples of both data-parallel ranks, with their entropy.
    mine_rows, their_rows = read_samples(target, 0), read_samples(tmp_path / "layout", 0)
    assert [row["entropy"] for row in mine_rows] == pytest.approx([row["entropy"] for row in their_rows], rel=1e-4)
    assert [row | {"entropy": 0} for row in mine_rows] == [row | {"entropy": 0} for row in their_rows]
    tokens = sum(row["length"] for row in mine_rows)
    mean = sum(row["entropy"] * row["length"] for row in mine_rows) / tokens
    assert mean == pytest.approx(second["entropy"]) and tokens == second["tokens"] and len(mine_rows) == 32


def test_a_new_run_starts_from_a_conversion(
    run_yaml: Path, small_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    converted = tmp_path / "converted"
    fork([str(ROOT / "tools" / "convert_checkpoint.py"), "to-megatron", str(small_model), str(converted)], 1)
    common = [str(run_yaml), "steps=2", "data.heldout=null", "checkpoint.export_huggingface=false"]
    assert main(common) == 0
    capsys.readouterr()
    assert main([*common, f"run_directory={tmp_path / 'from'}", f"checkpoint.start_from={converted}"]) == 0
    assert "its weights and a fresh optimizer" in capsys.readouterr().err
    assert records(tmp_path / "from") == records(tmp_path / "run")

    # Damage, another model and nothing at all are one line.
    data = next(converted.glob("*.distcp"))
    flipped = bytearray(data.read_bytes())
    flipped[len(flipped) // 2] ^= 1
    data.write_bytes(bytes(flipped))
    for folder, problem in ((converted, "is damaged ("), (tmp_path / "nothing", "there is no checkpoint")):
        new = [f"run_directory={tmp_path / 'new'}", f"checkpoint.start_from={folder}"]
        assert main([*common, *new]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert problem in error and "to-megatron" in error, error
