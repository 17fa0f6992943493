"""Runs with a KL penalty: what it does, how they resume, and that reference and policy never mix."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_rlvr.telemetry.metrics import deterministic, read_metrics
from megatron_rlvr.train import main
from tests.small_model import make_small_model

KL = ("kl_reference", "kl_penalty")


def records(run: Path) -> list[dict[str, float]]:
    return [deterministic(record) for record in read_metrics(run)]


def without_kl(run: Path) -> list[dict[str, float]]:
    return [{name: value for name, value in record.items() if name not in KL} for record in records(run)]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def equal(some: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> bool:
    return some.keys() == others.keys() and all(some[name].equal(others[name]) for name in some)


@pytest.fixture
def common(run_yaml: Path) -> list[str]:
    return [str(run_yaml), "data.heldout=null", "checkpoint.keep=9"]


def test_a_negligible_penalty_leaves_no_trace(common: list[str], tmp_path: Path) -> None:
    """The reference is another model. Updates, checkpoints and exports are those of a run without one, bit for bit."""
    common = [*common, "steps=3", "algorithm.drop_zero_advantage=false"]
    other = make_small_model(tmp_path / "other", seed=5)
    plain, run = tmp_path / "plain", tmp_path / "run"
    penalty = [*common, f"reference.path={other}", "algorithm.kl_coefficient=1e-30"]
    assert main([*common, f"run_directory={plain}"]) == 0
    assert main([*penalty, "reference.weights=disk"]) == 0
    first = records(run)
    assert without_kl(run) == records(plain) and equal(weights(run / "huggingface"), weights(plain / "huggingface"))
    assert all(record["kl_reference"] > 0.1 and record["kl_penalty"] < 1e-29 for record in first)
    # Resumed from the second step, with the reference in memory.
    shutil.rmtree(run / "checkpoints" / "step_3")
    assert main([*penalty, "reference.weights=host"]) == 0
    assert records(run) == first and equal(weights(run / "huggingface"), weights(plain / "huggingface"))


def test_a_penalty_keeps_the_policy_near_the_reference(common: list[str], tmp_path: Path) -> None:
    last = {}
    for coefficient in (0.01, 3.0):
        run = tmp_path / str(coefficient)
        settings = ["checkpoint.every=0", "checkpoint.export_huggingface=false", f"run_directory={run}"]
        assert main([*common, "steps=3", *settings, f"algorithm.kl_coefficient={coefficient}"]) == 0
        first, *_, last[coefficient] = records(run)
        assert first["kl_reference"] == first["kl_penalty"] == 0.0  # the reference is the start model, bit for bit
        assert last[coefficient]["kl_penalty"] == pytest.approx(coefficient * last[coefficient]["kl_reference"])
    assert last[3.0]["kl_reference"] < 0.7 * last[0.01]["kl_reference"]


def test_a_run_from_another_one_keeps_its_reference(
    common: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, run = tmp_path / "source", tmp_path / "run"
    assert main([*common, "steps=1", f"run_directory={source}"]) == 0
    common = [*common, "steps=2", "algorithm.kl_coefficient=0.1"]
    assert main([*common, f"checkpoint.start_from={source}"]) == 0
    first = records(run)
    assert first[0]["kl_reference"] == 0.0 < first[1]["kl_reference"]
    assert equal(weights(run / "reference"), weights(source / "huggingface"))

    # The source may go, and the command line need not name it any more.
    shutil.rmtree(source)
    shutil.rmtree(run / "checkpoints" / "step_2")
    assert main(common) == 0
    assert records(run) == first

    capsys.readouterr()
    shutil.copy(make_small_model(tmp_path / "other", seed=5) / "model.safetensors", run / "reference")
    assert main([*common, "steps=3"]) == 2
    said = capsys.readouterr().err
    assert "error: reference.path (model.safetensors) has changed since the run in" in said and "Traceback" not in said
    assert len(records(run)) == 2
    assert main([*common, "steps=3", "resume.allow=[reference.path]"]) == 0
    assert records(run)[2]["kl_reference"] > 0.1
    history = [json.loads(line) for line in (run / "config_history.jsonl").read_text().splitlines()]
    assert "reference.path (model.safetensors)" in {record["key"] for record in history}

    capsys.readouterr()
    shutil.rmtree(run / "reference")
    assert main([*common, "steps=4"]) == 2
    assert "reference, in which a run that started from" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("reference.path=/nowhere", "reference.path=/nowhere is not a folder"),
        ("algorithm.kl_coefficient=-1", "algorithm.kl_coefficient must be at least 0"),
        ("algorithm.kl_coefficient=nan", "algorithm.kl_coefficient"),
        ("algorithm.kl_estimator=k4", "algorithm.kl_estimator"),
        ("algorithm.kl_in=both", "algorithm.kl_in"),
        ("reference.weights=tape", "reference.weights"),
    ],
)
def test_a_wrong_setting_is_one_line(
    common: list[str], setting: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*common, "algorithm.kl_coefficient=0.1", setting]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(errors) == 1 and said in errors[0]
