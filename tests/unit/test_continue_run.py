"""A run is continued with other settings: what is refused, what is allowed, and what is recorded."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_rlvr.config import Config, load_config, save_config, warnings_of
from megatron_rlvr.errors import UserError
from megatron_rlvr.lifecycle import open_run_directory
from megatron_rlvr.run_inputs import fingerprints


def start(run_yaml: Path, *overrides: str) -> Config:
    """Open the run directory as a start of the trainer does; returns the configuration that it trains."""
    with open_run_directory(load_config(run_yaml, overrides)) as config:
        return config


def begin(run_yaml: Path, tmp_path: Path, *overrides: str, done: int = 4) -> Path:
    """Start a run and let it have checkpoints; returns its directory."""
    start(run_yaml, *overrides)
    run = tmp_path / "run"
    for step in (done, 91):  # that of step 91 is an empty folder, as a kill can leave it
        (run / "checkpoints" / f"step_{step}").mkdir(parents=True)
    (run / "checkpoints" / f"step_{done}" / "run.json").write_text(json.dumps({"step": done, "model": {}}))
    return run


def history(run: Path) -> list[dict[str, Any]]:
    path = run / "config_history.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def test_adapters_cannot_change(run_yaml: Path, tmp_path: Path) -> None:
    begin(run_yaml, tmp_path, "lora.rank=4")
    with pytest.raises(
        UserError, match=r"lora.alpha=32.0, this one has 8.0, which cannot change .* set it back"
    ) as error:
        start(run_yaml, "lora.rank=4", "lora.alpha=8")
    assert "resume.allow" not in str(error.value)


@pytest.mark.parametrize(
    ("override", "allow"),
    [
        ("optimizer.learning_rate=1e-3", "optimizer.learning_rate"),
        ("rollout.samples_per_prompt=8", "rollout.samples_per_prompt"),
        ("rollout.samples_per_prompt=8", "rollout"),
        ("verifier.name=exact", "verifier.name"),
        ("data.heldout=null", "data.heldout"),
        ("algorithm.schedule.split=0.3", "algorithm.schedule.split"),
        ("algorithm.schedule.total_steps=9", "algorithm.schedule.total_steps"),
        ("algorithm.schedule.name=oscillatory-decay", "algorithm.schedule"),
        ("algorithm.objective.name=gspo", "algorithm.objective"),
        ("seed=7", "seed"),
        ("data.reasoning_gym.options.x={y: 1}", "data.reasoning_gym.options.x"),
    ],
)
def test_a_change_needs_the_flag_that_its_refusal_names(
    override: str, allow: str, run_yaml: Path, tmp_path: Path
) -> None:
    run = begin(run_yaml, tmp_path)
    before = (run / "config.yaml").read_text()
    with pytest.raises(UserError) as error:
        start(run_yaml, override)
    assert f"add resume.allow=[{allow}] to continue" in str(error.value) or allow == "rollout"
    assert "\n" not in str(error.value)
    assert (run / "config.yaml").read_text() == before and not history(run)

    config = start(run_yaml, override, f"resume.allow=[{allow}]")
    key, _, _ = override.partition("=")
    record = next(entry for entry in history(run) if entry["key"] == key)
    assert record["step"] == 4 and record["old"] != record["new"] and record["time"]
    again = start(run_yaml, override)  # config.yaml holds the change, and no allowance
    assert again.algorithm == config.algorithm and again.optimizer == config.optimizer
    assert load_config(run / "config.yaml").resume.allow == []
    if "total_steps" in key:  # without a value, it keeps the one that the run has
        assert start(run_yaml).algorithm.schedule.total_steps == 9
        return
    with pytest.raises(UserError, match=r"resume\.allow="):
        start(run_yaml)


def test_the_refusal_names_everything_that_differs_at_once(run_yaml: Path, tmp_path: Path) -> None:
    begin(run_yaml, tmp_path)
    changes = ["seed=9", "optimizer.beta1=0.8", "algorithm.schedule.name=constant", "resume.allow=[optimizer.beta1]"]
    with pytest.raises(UserError) as error:
        start(run_yaml, *changes)
    text = str(error.value)
    assert "resume.allow=[optimizer.beta1,seed,algorithm.schedule] to continue" in text
    start(run_yaml, *changes[:3], "resume.allow=[optimizer.beta1,seed,algorithm.schedule]")


def test_free_settings_are_recorded_too(run_yaml: Path, tmp_path: Path) -> None:
    run = begin(run_yaml, tmp_path)
    start(run_yaml, "steps=9", "checkpoint.keep=5")
    assert [(r["key"], r["old"], r["new"]) for r in history(run)] == [("steps", 6, 9), ("checkpoint.keep", 2, 5)]
    start(run_yaml, "steps=9", "checkpoint.keep=5")
    assert len(history(run)) == 2


def test_an_allowance_is_checked(run_yaml: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"resume.allow: unknown configuration key 'optimizer.lr'"):
        start(run_yaml, "resume.allow=[optimizer.lr]")
    with pytest.raises(UserError, match=r"did you mean 'optimizer.learning_rate'"):
        start(run_yaml, "resume.allow=[optimizer.learning_rat]")


def test_more_steps_do_not_stretch_the_schedules(run_yaml: Path, tmp_path: Path) -> None:
    run = begin(run_yaml, tmp_path, "steps=60", "optimizer.min_learning_rate=1e-4", done=60)
    config = start(run_yaml, "steps=80", "optimizer.min_learning_rate=1e-4")
    assert (config.algorithm.schedule.total_steps, config.optimizer.decay_steps) == (60, 60)
    [warning] = [line for line in warnings_of(config) if "total_steps=60 is less than steps=80" in line]
    assert "add algorithm.schedule.total_steps=80 resume.allow=[algorithm.schedule.total_steps]" in warning
    again = start(run_yaml, "steps=100", "optimizer.min_learning_rate=1e-4")
    assert again.algorithm.schedule.total_steps == 60
    stretched = start(
        run_yaml,
        *("steps=100", "optimizer.min_learning_rate=1e-4", "algorithm.schedule.total_steps=100"),
        "resume.allow=[algorithm.schedule.total_steps]",
    )
    assert (stretched.algorithm.schedule.total_steps, stretched.optimizer.decay_steps) == (100, 60)
    assert load_config(run / "config.yaml").algorithm.schedule.total_steps == 100


def test_a_run_of_an_earlier_version_keeps_its_length(run_yaml: Path, tmp_path: Path) -> None:
    run = begin(run_yaml, tmp_path)
    save_config(load_config(run_yaml), run / "config.yaml")  # without the lengths
    assert start(run_yaml, "steps=50").algorithm.schedule.total_steps == 6


def test_fewer_steps_than_done_are_refused(run_yaml: Path, tmp_path: Path) -> None:
    run = begin(run_yaml, tmp_path)
    before = (run / "config.yaml").read_text()
    with pytest.raises(UserError, match=r"has done 4 steps, steps=3 is less: set steps to at least 4"):
        start(run_yaml, "steps=3")
    assert (run / "config.yaml").read_text() == before
    start(run_yaml, "steps=4")


def test_a_run_continues_from_its_own_checkpoints(run_yaml: Path, tmp_path: Path) -> None:
    run = begin(run_yaml, tmp_path, "checkpoint.start_from=somewhere")
    start(run_yaml, "checkpoint.start_from=somewhere")
    start(run_yaml)
    assert load_config(run / "config.yaml").checkpoint.start_from == "somewhere"
    with pytest.raises(UserError, match=r"and not from checkpoint.start_from=elsewhere: remove"):
        start(run_yaml, "checkpoint.start_from=elsewhere")


def test_exchanged_data_is_allowed_by_its_key(run_yaml: Path, problems: Path, tmp_path: Path) -> None:
    own = shutil.copyfile(problems, tmp_path / "own.jsonl")
    run = begin(run_yaml, tmp_path, f"data.train={own}")
    own.write_bytes(own.read_bytes() + b"\n")
    with pytest.raises(UserError, match=r"own.jsonl\) has changed .* add resume.allow=\[data.train\]"):
        start(run_yaml, f"data.train={own}")
    start(run_yaml, f"data.train={own}", "resume.allow=[data.train]")
    start(run_yaml, f"data.train={own}")
    [record] = history(run)
    assert record["key"] == "data.train (own.jsonl)" and len(record["old"]) == len(record["new"]) == 64
    other = shutil.copyfile(problems, tmp_path / "other.jsonl")
    start(run_yaml, f"data.train={other}", "resume.allow=[data.train]")
    start(run_yaml, f"data.train={other}")


def test_a_verifier_is_found_without_an_import(run_yaml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "own_package"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported in the trainer')\n")
    (package / "rewards.py").write_text("def score(completion, answer):\n    return 1.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    config = load_config(run_yaml, ["verifier.name=own_package.rewards:score"])
    assert "verifier.name (rewards.py)" in fingerprints(config)
    assert "own_package" not in sys.modules
    for missing in ("own_package.nothing:score", "nothing.at.all:score", "own_package.rewards.x:score"):
        config.verifier.name = missing
        assert not [key for key in fingerprints(config) if key.startswith("verifier")]
