"""A rollout that fails on one rank ends all ranks with a checkpoint and the reason."""

from __future__ import annotations

import subprocess
from pathlib import Path

from megatron_rlvr.telemetry.metrics import read_metrics
from tests.processes import launch, run_trainer


def train_under_torchrun(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Train in two processes; torchrun gives the others time to say what they know before it ends them."""
    return launch(["-m", "megatron_rlvr.train", *map(str, arguments)], 2, check=False)


def test_a_user_error_of_one_rank_reaches_all_of_them(run_yaml: Path, tmp_path: Path) -> None:
    recorded, run = tmp_path / "recorded", tmp_path / "run"
    settings = ["steps=3", "checkpoint.every=0", "data.heldout=null"]
    run_trainer(run_yaml, f"run_directory={recorded}", *settings, "rollout.record=true")
    missing = recorded / "rollouts" / "step_000002" / "prompt_00001.jsonl"  # a prompt of the second data-parallel rank
    missing.unlink()
    replay = ["rollout.engine=recorded", f"rollout.recording={recorded / 'rollouts'}"]
    done = train_under_torchrun(run_yaml, f"run_directory={run}", *settings, *replay)
    assert done.returncode != 0
    reason = f"no recorded rollout {missing}: record a run with rollout.record=true and the same settings"
    assert f"\nerror: {reason} (reported by rank 1)\n" in f"\n{done.stderr}"
    assert f"\nerror (rank 1): {reason}\n" in f"\n{done.stderr}"
    # The two steps before the failure are kept, so the run can resume once the recording is complete.
    assert len(read_metrics(run)) == 2
    assert (run / "checkpoints" / "step_2" / "run.json").is_file()


def test_a_verifier_that_verifies_nothing_stops_all_ranks(run_yaml: Path, tmp_path: Path) -> None:
    broken = ["verifier.name=tests.rewards:divides_by_zero", "verifier.workers=1", "parallel.tensor=2"]
    done = train_under_torchrun(run_yaml, *broken)
    assert done.returncode != 0
    reason = "verifier tests.rewards:divides_by_zero failed for all 32 completions, so there is nothing to learn: "
    assert f"\nerror: {reason}ZeroDivisionError: division by zero" in f"\n{done.stderr}"
    assert f"\nerror (rank 1): {reason}" in f"\n{done.stderr}"  # which verifies nothing itself
    assert done.stderr.count("return 1 / 0") == 1  # the traceback, once
    assert not (tmp_path / "run" / "metrics.jsonl").exists() or not read_metrics(tmp_path / "run")
