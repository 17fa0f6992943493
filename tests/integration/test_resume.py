"""A run that is killed anywhere and started again equals an uninterrupted run."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from megatron_rlvr.exit_status import EXIT_STOPPED
from megatron_rlvr.telemetry.metrics import deterministic, read_metrics
from tests.processes import ROOT, environment, run_trainer

FIELDS = {
    *("step", "reward", "entropy", "ratio_max", "grad_norm", "kl_rollout", "lr", "tokens"),
    *("clip/upper_slope", "clip/upper_intercept", "clip/lower_slope", "clip/lower_intercept"),
    *("clip/fraction_high", "clip/fraction_low", "region/E1", "region/E2", "region/E3", "region/E4"),
    *("entropy_change/predicted", "entropy_change/measured", "time/step", "time/generate"),
}


def _start(config: Path, *overrides: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-u", "-m", "megatron_rlvr.train", str(config), *overrides]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, env=environment(), cwd=ROOT, text=True, **streams)  # type: ignore[call-overload]


def _stop_after(process: subprocess.Popen[str], steps: int, number: signal.Signals, delay: float = 0.0) -> int:
    """Send a signal `delay` seconds after the process has printed `steps` steps; return the exit status."""
    printed = []
    for line in process.stdout:  # type: ignore[union-attr]
        printed.append(line)
        if sum(text.startswith("step ") for text in printed) == steps:
            break
    assert process.poll() is None, "".join(printed)
    time.sleep(delay)
    process.send_signal(number)
    process.stdout.read()  # type: ignore[union-attr]
    return process.wait()


def _leave_unfinished_checkpoints(run: Path) -> None:
    """Create the files that a kill during a save leaves: unfinished checkpoints, and a pointer to one of them."""
    newest = run / "checkpoints" / "step_90.partial"
    newest.mkdir()
    (newest / "__0_0.distcp").write_bytes(b"half a file")
    (run / "checkpoints" / "step_91").mkdir()
    (run / "checkpoints" / "latest").write_text("step_91")


def test_killed_and_resumed_run_equals_the_uninterrupted_one(run_yaml: Path, tmp_path: Path) -> None:
    settings = ["steps=16", "checkpoint.every=2", "algorithm.schedule.name=target-entropy"]
    uninterrupted, killed = tmp_path / "uninterrupted", tmp_path / "killed"
    run_trainer(run_yaml, f"run_directory={uninterrupted}", *settings)
    overrides = [f"run_directory={killed}", *settings]
    for steps, delay in ((1, 0.0), (2, 0.03), (3, 0.11)):
        assert _stop_after(_start(run_yaml, *overrides), steps, signal.SIGKILL, delay) == -signal.SIGKILL
    _leave_unfinished_checkpoints(killed)
    assert _stop_after(_start(run_yaml, *overrides), 1, signal.SIGTERM) == EXIT_STOPPED
    run_trainer(run_yaml, *overrides)

    expected, found = read_metrics(uninterrupted), read_metrics(killed)
    assert [deterministic(r) for r in found] == [deterministic(r) for r in expected]
    assert len({r["grad_norm"] for r in found}) == 16
    assert found[0].keys() >= FIELDS
    assert (killed / "evaluations.jsonl").read_bytes() == (uninterrupted / "evaluations.jsonl").read_bytes()
    expected_weights = load_file(uninterrupted / "huggingface" / "model.safetensors")
    for name, tensor in load_file(killed / "huggingface" / "model.safetensors").items():
        assert tensor.equal(expected_weights[name]), name
    kept = [d.name for d in (killed / "checkpoints").iterdir() if (d / "run.json").is_file()]
    assert len(kept) == 2 and "step_16" in kept


def test_run_directory_in_use_is_refused(run_yaml: Path, tmp_path: Path) -> None:
    first = _start(run_yaml, "steps=2000", "checkpoint.every=0")
    try:
        lock = tmp_path / "run" / ".lock"
        while not (lock.is_file() and lock.read_text() == str(first.pid)):
            assert first.poll() is None, "the first run ended without locking its directory"
            time.sleep(0.05)
        second = run_trainer(run_yaml, check=False)
        assert second.returncode == 2
        assert f"is in use by process {first.pid}" in second.stderr
    finally:
        first.kill()
        first.wait()


def test_checkpoint_of_another_model_is_refused(run_yaml: Path, tmp_path: Path) -> None:
    from tests.small_model import make_small_model

    run_trainer(run_yaml, "steps=1")
    other = make_small_model(tmp_path / "other", hidden=48)
    done = run_trainer(run_yaml, f"model.path={other}", check=False)
    assert done.returncode == 2
    assert (
        "is a checkpoint of another model (hidden_size=32 instead of 48, intermediate_size=64 instead of 96)"
        in done.stderr
    )
    assert "Traceback" not in done.stderr


def test_resuming_with_other_settings_is_refused(run_yaml: Path, tmp_path: Path) -> None:
    from megatron_rlvr.train import main

    assert main([str(run_yaml), "steps=1"]) == 0
    before = (tmp_path / "run" / "config.yaml").read_text()
    assert main([str(run_yaml), "steps=2", "algorithm.schedule.name=constant"]) == 2
    assert (tmp_path / "run" / "config.yaml").read_text() == before
    assert main([str(run_yaml), "steps=2", "telemetry.plots=true"]) == 0


@pytest.mark.parametrize("objective", ["gspo", "ce-gppo"])
def test_other_objectives_train(objective: str, run_yaml: Path, tmp_path: Path) -> None:
    run_trainer(run_yaml, "steps=2", f"algorithm.objective.name={objective}", "algorithm.aggregation=sequence-mean")
    assert all(r["grad_norm"] > 0 for r in read_metrics(tmp_path / "run"))


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_death_around_a_save_loses_no_metrics(
    moment: str, run_yaml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_rlvr.train import main
    from megatron_rlvr.training.checkpoint import Checkpoints

    class Death(BaseException):
        pass

    save = Checkpoints.save

    def die(self: Checkpoints, step: int, *arguments: object) -> Path:
        if step == 3 and moment == "before":
            raise Death
        folder = save(self, step, *arguments)  # type: ignore[arg-type]
        if step == 3:
            raise Death
        return folder

    arguments = [str(run_yaml), "steps=4", "data.heldout=null"]
    monkeypatch.setattr(Checkpoints, "save", die)
    with pytest.raises(Death):
        main(arguments)
    monkeypatch.setattr(Checkpoints, "save", save)
    assert main(arguments) == 0
    assert main([*arguments, f"run_directory={tmp_path / 'uninterrupted'}"]) == 0
    found, expected = read_metrics(tmp_path / "run"), read_metrics(tmp_path / "uninterrupted")
    assert [deterministic(r) for r in found] == [deterministic(r) for r in expected]
