"""Every layout computes what one process computes, on the same rollouts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from megatron_rlvr.telemetry.metrics import deterministic, read_metrics
from tests.conftest import run_trainer, run_trainers

LAYOUTS = {
    "dp2": (2, []),
    "tp2": (2, ["parallel.tensor=2"]),
    "tp2-sp": (2, ["parallel.tensor=2", "parallel.sequence=true"]),
    "tp2-fused": (2, ["parallel.tensor=2", "algorithm.fused_linear=true"]),
    "tp2-sp-fused": (2, ["parallel.tensor=2", "parallel.sequence=true", "algorithm.fused_linear=true"]),
    "pp2": (2, ["parallel.pipeline=2"]),
    "pp2-microbatches": (2, ["parallel.pipeline=2", "parallel.microbatch_sequences=3"]),
    "dp2-zero": (2, ["parallel.distributed_optimizer=true"]),
    "tp2-dp2": (4, ["parallel.tensor=2"]),
    "tp2-pp2": (4, ["parallel.tensor=2", "parallel.pipeline=2"]),
    "pp2-dp2-zero": (4, ["parallel.pipeline=2", "parallel.distributed_optimizer=true"]),
}
# Runs of LAYOUTS that are taken back to the checkpoint of their third step and resumed by two processes.
RESUMED = {
    "tp2-pp2": [],
    "dp2-zero": ["parallel.distributed_optimizer=true"],
    "pp2-dp2-zero": ["parallel.tensor=2", "parallel.distributed_optimizer=true"],
}
GENERATING = ("dp2", "tp2", "pp2")
EXACT = ("reward", "tokens", "lr")
CLOSE = (
    *("loss", "grad_norm", "entropy", "entropy_standard_error", "entropy_change/predicted", "entropy_change/measured"),
    *("ratio_max", "clip/upper_intercept", "clip/lower_slope", "control/steering", "control/shift"),
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, small_model: Path, problems: Path) -> Path:
    """Finished runs: ``one`` recorded its rollouts, the layouts replayed them, ``*-generated`` made their own."""
    folder = tmp_path_factory.mktemp("layouts")
    config = folder / "run.yaml"
    config.write_text(
        f"""
steps: 4
seed: 1
run_directory: unset
threads: 1
model: {{path: {small_model}}}
data: {{train: {problems}, stratify_key: kind}}
verifier: {{name: "tests.rewards:letter_sum"}}
rollout: {{prompts_per_step: 8, samples_per_prompt: 4, max_tokens: 10, temperature: 0.9}}
algorithm: {{epochs: 2, minibatches: 2, schedule: {{name: target-entropy}}}}
optimizer: {{learning_rate: 1.0e-3}}
telemetry: {{tensorboard: false, plots: false}}
checkpoint: {{every: 3, keep: 9, export_huggingface: false}}
"""
    )
    run_trainer(config, f"run_directory={folder / 'one'}", "rollout.record=true")
    replay = ["rollout.engine=recorded", f"rollout.recording={folder / 'one' / 'rollouts'}"]
    jobs: dict[int, list[list[object]]] = {}
    for name, (processes, overrides) in LAYOUTS.items():
        jobs.setdefault(processes, []).append([config, f"run_directory={folder / name}", *replay, *overrides])
    for name in GENERATING:
        processes, overrides = LAYOUTS[name]
        directory = f"run_directory={folder / f'{name}-generated'}"
        jobs[processes].append([config, directory, "rollout.record=true", "steps=1", *overrides])
    for processes, arguments in jobs.items():
        run_trainers(arguments, processes)
    resumed = []
    for name, overrides in RESUMED.items():
        directory = shutil.copytree(folder / name, folder / f"{name}-resumed")
        shutil.rmtree(directory / "checkpoints" / "step_4")
        resumed.append([config, f"run_directory={directory}", *replay, *overrides])
    run_trainers(resumed, processes=2)
    return folder


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_equals_one_process(name: str, runs: Path) -> None:
    agree(runs / "one", runs / name)


@pytest.mark.parametrize("name", RESUMED)
def test_resumed_in_another_layout(name: str, runs: Path) -> None:
    agree(runs / "one", runs / f"{name}-resumed")
    steps = sorted(p.name for p in (runs / f"{name}-resumed" / "checkpoints").glob("step_*"))
    assert steps == ["step_3", "step_4"]


def test_resumed_distributed_optimizer_is_bit_equal(runs: Path) -> None:
    whole, resumed = (read_metrics(runs / name) for name in ("dp2-zero", "dp2-zero-resumed"))
    assert [deterministic(r) for r in resumed] == [deterministic(r) for r in whole]


def agree(one: Path, other: Path) -> None:
    """The metrics of two runs are the same but for the order of float32 sums."""
    expected, found = read_metrics(one), read_metrics(other)
    assert len(found) == len(expected) == 4
    for ours, theirs in zip(expected, found, strict=True):
        assert ours["grad_norm"] > 1e-3
        assert [theirs[key] for key in EXACT] == [ours[key] for key in EXACT]
        for key in CLOSE:
            # The loss near ratio 1 and the drift of entropies are differences of nearly equal numbers: absolute there.
            assert theirs[key] == pytest.approx(ours[key], rel=1e-5, abs=2e-6), (ours["step"], key)


@pytest.mark.parametrize("name", GENERATING)
def test_layout_generates_what_one_process_generates(name: str, runs: Path) -> None:
    ours, theirs = runs / f"{name}-generated" / "rollouts", runs / "one" / "rollouts" / "step_000000"
    files = sorted(ours.rglob("*.jsonl"))
    assert len(files) == 8
    # The same random numbers on logits that differ in the last bits: a draw may fall the other way, but seldom.
    equal = sum(a == b for f in files for a, b in zip(_token_ids(f), _token_ids(theirs / f.name), strict=True))
    assert equal >= 31


def _token_ids(path: Path) -> list[list[int]]:
    return [json.loads(line)["token_ids"] for line in path.read_text().splitlines()]
