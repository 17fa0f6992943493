"""Checkpoints: written in the background, rotated, damaged, or on a full disk."""

from __future__ import annotations

import json
import shutil
import threading
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemWriter

from megatron_rlvr.telemetry.metrics import deterministic, read_metrics
from megatron_rlvr.train import main
from megatron_rlvr.training.checkpoint import Checkpoints
from tests.processes import DEADLINE_SECONDS, ROOT, launch


@pytest.fixture
def arguments(run_yaml: Path) -> list[str]:
    return [str(run_yaml), "data.heldout=null", "checkpoint.export_huggingface=false"]


def names(run: Path) -> list[str]:
    return sorted(entry.name for entry in (run / "checkpoints").iterdir())


def test_asynchronous_saves_contain_the_state_of_their_step(arguments: list[str], tmp_path: Path) -> None:
    for name, asynchronous in (("background", "true"), ("foreground", "false")):
        settings = [*arguments, f"run_directory={tmp_path / name}", f"checkpoint.asynchronous={asynchronous}"]
        assert main([*settings, "steps=3"]) == 0
        assert names(tmp_path / name) == ["latest", "step_2", "step_3"]
        assert main([*settings, "steps=5"]) == 0
    found, expected = read_metrics(tmp_path / "background"), read_metrics(tmp_path / "foreground")
    assert len(expected) == 5 and [deterministic(r) for r in found] == [deterministic(r) for r in expected]


def test_training_continues_while_a_checkpoint_is_written(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The write of step 2 waits until the save of step 3 begins, so training must get that far without it."""
    reached, saved = threading.Event(), []
    save, write = Checkpoints.save, FileSystemWriter.write_data

    def wait(self: FileSystemWriter, *rest: object) -> object:
        assert reached.wait(DEADLINE_SECONDS)
        return write(self, *rest)  # type: ignore[arg-type]

    def note(self: Checkpoints, step: int, *rest: object) -> None:
        saved.append((step, names(tmp_path / "run") if saved else []))
        if step == 3:
            reached.set()
        save(self, step, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(FileSystemWriter, "write_data", wait)
    monkeypatch.setattr(Checkpoints, "save", note)
    assert main([*arguments, "steps=3", "checkpoint.every=2", "checkpoint.asynchronous=true"]) == 0
    assert saved == [(2, []), (3, ["step_2.partial"])]
    assert names(tmp_path / "run") == ["latest", "step_2", "step_3"]


@pytest.mark.parametrize("asynchronous", ["false", "true"])
def test_a_full_disk_keeps_the_earlier_checkpoint(
    asynchronous: str,
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings = [*arguments, "steps=4", f"checkpoint.asynchronous={asynchronous}", "checkpoint.every=2"]
    write, calls = FileSystemWriter.write_data, []

    def fill(self: FileSystemWriter, *rest: object) -> object:
        calls.append(1)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return write(self, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(FileSystemWriter, "write_data", fill)
    assert main(settings) == 2
    [line] = [text for text in capsys.readouterr().err.splitlines() if text.startswith("error")]
    assert "step_4 cannot be written" in line and "No space left on device" in line and "intact" in line
    assert names(tmp_path / "run") == ["latest", "step_2"]
    assert main(settings) == 0  # once there is room, it resumes from there
    assert main([*arguments, "steps=4", f"run_directory={tmp_path / 'uninterrupted'}"]) == 0
    found, expected = read_metrics(tmp_path / "run"), read_metrics(tmp_path / "uninterrupted")
    assert [deterministic(r) for r in found] == [deterministic(r) for r in expected]


def test_kept_checkpoints(arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one checkpoint per hour, every third is kept by time, and also the best and the newest."""
    hours = count()
    clock = SimpleNamespace(time=lambda: 3600.0 * next(hours))
    monkeypatch.setattr("megatron_rlvr.training.checkpoint.time", clock)
    settings = ["steps=8", "checkpoint.keep=1", "checkpoint.keep_hours=3", "checkpoint.keep_best=reward"]
    assert main([*arguments, *settings]) == 0
    run = tmp_path / "run"
    rewards = {r["step"] + 1: r["reward"] for r in read_metrics(run)}
    best = max(rewards, key=lambda step: (rewards[step], step))
    kept = {f"step_{step}" for step in (1, 4, 7, best, 8)}
    assert set(names(run)) == kept | {"latest"}
    record = json.loads((run / "checkpoints" / f"step_{best}" / "run.json").read_text())
    assert record["score"] == rewards[best]


def test_an_unknown_metric_is_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*arguments, "steps=1", "checkpoint.keep_best=rewrd"]) == 2
    assert "checkpoint.keep_best=rewrd is not a metric of this run: use one of " in capsys.readouterr().err


def test_the_best_evaluation_is_kept(run_yaml: Path, tmp_path: Path) -> None:
    best = ["checkpoint.keep=1", "checkpoint.keep_best=evaluation/reward", "evaluation.every=2"]
    first = [str(run_yaml), "checkpoint.export_huggingface=false", *best]
    assert main([*first, "steps=2"]) == 0
    assert main([*first, "steps=3"]) == 0  # resumed: it saves before its first evaluation
    assert "step_3" in names(tmp_path / "run")
    scores = [json.loads(line)["reward"] for line in (tmp_path / "run" / "evaluations.jsonl").read_text().splitlines()]
    record = json.loads((tmp_path / "run" / "checkpoints" / "step_3" / "run.json").read_text())
    assert record["score"] == scores[-1]
    assert main([*first, "steps=3", "data.heldout=null", f"run_directory={tmp_path / 'other'}"]) == 2


def test_another_format_of_optimizer_state_is_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*arguments, "steps=1"]) == 0
    assert main([*arguments, "steps=2", "parallel.distributed_optimizer=true"]) == 2
    assert "step_1 was written with parallel.distributed_optimizer=false" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_skipped(arguments: list[str], tmp_path: Path) -> None:
    assert main([*arguments, "steps=4"]) == 0
    before = [deterministic(r) for r in read_metrics(tmp_path / "run")]
    data = next((tmp_path / "run" / "checkpoints" / "step_4").glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:-100])
    assert main([*arguments, "steps=4"]) == 0
    assert [deterministic(r) for r in read_metrics(tmp_path / "run")] == before
    assert names(tmp_path / "run") == ["latest", "step_3", "step_4"]


def test_a_run_is_never_begun_anew_in_silence(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "steps=2"]) == 0
    before, checkpoints = (tmp_path / "run" / "metrics.jsonl").read_bytes(), tmp_path / "run" / "checkpoints"
    (checkpoints / "latest").unlink()  # the settings are compared without it, too
    assert main([*arguments, "steps=2", "algorithm.schedule.name=constant"]) == 2
    for step in (1, 2):
        with (checkpoints / f"step_{step}" / "__0_0.distcp").open("r+b") as file:
            file.seek(1000)
            file.write(bytes([file.read(1)[0] ^ 1]))
    capsys.readouterr()
    assert main([*arguments, "steps=2"]) == 2
    [line] = [text for text in capsys.readouterr().err.splitlines() if text.startswith("error")]
    assert "step_2 is damaged (__0_0.distcp differs" in line and "step_1 is damaged (__0_0.distcp differs" in line
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before and names(tmp_path / "run") == [
        "step_1",
        "step_2",
    ]


def test_the_export_names_its_precision(
    run_yaml: Path, small_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The model that training starts from calls itself bfloat16, but the policy is float32."""
    model, exported = shutil.copytree(small_model, tmp_path / "model"), tmp_path / "run" / "huggingface"
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    arguments = [str(run_yaml), "steps=1", "data.heldout=null", f"model.path={model}"]
    assert main(arguments) == 0
    exact = load_file(exported / "model.safetensors")
    assert json.loads((exported / "config.json").read_text())["dtype"] == "float32"
    assert {tensor.dtype for tensor in exact.values()} == {torch.float32}
    capsys.readouterr()
    assert main([*arguments, "checkpoint.export_dtype=bfloat16"]) == 0
    assert "huggingface: weights in float32 are rounded to bfloat16" in capsys.readouterr().err
    rounded = load_file(exported / "model.safetensors")
    assert json.loads((exported / "config.json").read_text())["dtype"] == "bfloat16"
    assert all(rounded[name].equal(tensor.bfloat16()) for name, tensor in exact.items())


def test_a_fused_adam_resumes_in_another_layout(run_yaml: Path, tmp_path: Path) -> None:
    """The distributed optimizer over an Adam with a step count per group, like Apex's and Transformer Engine's."""
    program = str(ROOT / "tests" / "fused_adam.py")
    settings = [str(run_yaml), "data.heldout=null", "steps=4", "checkpoint.every=2", "checkpoint.keep=9"]
    settings += ["checkpoint.export_huggingface=false", "parallel.distributed_optimizer=true"]
    uninterrupted, resumed = tmp_path / "uninterrupted", tmp_path / "resumed"
    launch([program, json.dumps([*settings, f"run_directory={uninterrupted}"])], 1, check=True)
    shutil.copytree(uninterrupted, resumed)
    shutil.rmtree(resumed / "checkpoints" / "step_4")
    launch([program, json.dumps([*settings, f"run_directory={resumed}"])], 2, check=True)
    expected, found = read_metrics(uninterrupted), read_metrics(resumed)
    assert [r["step"] for r in found] == [0, 1, 2, 3]
    assert deterministic(found[-1]) != deterministic(expected[-1])  # computed again, with another order of sums
    for key in ("loss", "grad_norm", "entropy", "entropy_change/measured"):
        assert found[-1][key] == pytest.approx(expected[-1][key], rel=1e-5, abs=2e-6), key


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("load_parameter_state_from_fs_model_space", "AdamW holds another exp_avg than the checkpoint"),
        ("step", "AdamW has taken [0, 2] steps after loading a state of 2"),
    ],
)
def test_a_state_that_is_loaded_wrongly_is_refused(
    broken: str,
    message: str,
    arguments: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Bugs that megatron-core's code for some Adam implementations could have."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    settings = [*arguments, "parallel.distributed_optimizer=true", "algorithm.epochs=1"]
    assert main([*settings, "steps=1"]) == 0
    if broken == "step":
        load = DistributedOptimizer.load_state_dict

        def forget(self: DistributedOptimizer, state: dict) -> None:
            load(self, state)
            for slot in self.optimizer.state.values():
                slot["step"] = torch.tensor(0.0)

        monkeypatch.setattr(DistributedOptimizer, "load_state_dict", forget)
    else:
        monkeypatch.setattr(DistributedOptimizer, broken, lambda *_: None)
    assert main([*settings, "steps=2"]) == 2
    assert message in capsys.readouterr().err
