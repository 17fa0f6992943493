"""A resumed run notices that its data, its tokenizer or its verifier was exchanged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_rlvr.config import Config, load_config
from megatron_rlvr.errors import UserError
from megatron_rlvr.run_inputs import INPUTS_FILE, fingerprints, record_inputs
from megatron_rlvr.train import main


@pytest.fixture
def config(
    run_yaml: Path, small_model: Path, problems: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Config:
    """A configuration whose files may be changed, and the record of its first start."""
    shutil.copytree(small_model, tmp_path / "model")
    for name in ("train", "heldout"):
        shutil.copyfile(problems, tmp_path / f"{name}.jsonl")
    (tmp_path / "my_rewards.py").write_text("def score(completion, answer):\n    return 1.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    overrides = [f"data.{name}={tmp_path}/{name}.jsonl" for name in ("train", "heldout")]
    overrides += [f"model.path={tmp_path / 'model'}", "verifier.name=my_rewards:score"]
    config = load_config(run_yaml, overrides)
    Path(config.run_directory).mkdir()
    record_inputs(config, resumes=False)
    return config


def append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\n")


def end_with(path: Path, token: int) -> None:
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"eos_token_id": [config["eos_token_id"], token]}))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda here: append(here / "train.jsonl"), "data.train (train.jsonl) has changed since the run in"),
        (lambda here: append(here / "heldout.jsonl"), "data.heldout (heldout.jsonl) has changed"),
        (lambda here: (here / "heldout.jsonl").unlink(), "data.heldout (heldout.jsonl) is missing"),
        (lambda here: append(here / "model" / "tokenizer.json"), "tokenizer.json in model.path has changed"),
        (
            lambda here: (here / "model" / "chat_template.jinja").write_text("x"),
            "chat_template.jinja in model.path is new",
        ),
        (
            lambda here: (here / "model" / "special_tokens_map.json").write_text("{}"),
            "special_tokens_map.json in model.path is new",
        ),
        (lambda here: end_with(here / "model" / "config.json", 5), "eos_token_id of config.json in model.path has"),
    ],
)
def test_an_exchanged_file_is_refused(
    change: Callable[[Path], object], said: str, config: Config, tmp_path: Path
) -> None:
    record_inputs(config, resumes=True)
    change(tmp_path)
    with pytest.raises(UserError) as error:
        record_inputs(config, resumes=True)
    assert said in str(error.value) and "\n" not in str(error.value)
    record_inputs(config, resumes=False)  # a new run in the directory takes the files as they are
    record_inputs(config, resumes=True)


def test_a_run_of_an_earlier_version_goes_on(config: Config, tmp_path: Path) -> None:
    file = Path(config.run_directory) / INPUTS_FILE
    recorded = json.loads(file.read_text())
    del recorded["eos_token_id of config.json in model.path"]
    file.write_text(json.dumps(recorded))
    assert record_inputs(config, resumes=True) == []
    end_with(tmp_path / "model" / "config.json", 5)
    with pytest.raises(UserError, match="eos_token_id of config"):  # recorded by the first resume
        record_inputs(config, resumes=True)


def test_another_verifier_warns_once(config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    append(tmp_path / "my_rewards.py")
    record_inputs(config, resumes=True)
    assert "warning: verifier.name (my_rewards.py) has changed since this run began" in capsys.readouterr().err
    record_inputs(config, resumes=True)
    assert capsys.readouterr().err == ""


def test_a_moved_model_is_the_same(config: Config, tmp_path: Path) -> None:
    before = fingerprints(config)
    (tmp_path / "model").rename(tmp_path / "moved")
    config.model.path = str(tmp_path / "moved")
    assert fingerprints(config) == before and len(before) >= 5


def test_the_program_compares_before_it_builds_anything(
    config: Config, run_yaml: Path, problems: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(tmp_path / "run")
    own = shutil.copyfile(problems, tmp_path / "own.jsonl")
    arguments = [str(run_yaml), f"data.train={own}", "steps=1", "checkpoint.export_huggingface=false"]
    assert main(arguments) == 0
    append(own)
    capsys.readouterr()
    assert main([*arguments[:2], "steps=2", arguments[3]]) == 2
    assert "error: data.train (own.jsonl) has changed since the run in" in capsys.readouterr().err
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 1


def test_a_damaged_record_is_one_line(config: Config) -> None:
    path = Path(config.run_directory) / INPUTS_FILE
    assert len(json.loads(path.read_text())) >= 5
    path.write_text("{")
    with pytest.raises(UserError, match=r"inputs.json cannot be read \(not valid JSON"):
        record_inputs(config, resumes=True)


def test_a_verifier_is_found_below_folders_that_are_no_packages(config: Config, tmp_path: Path) -> None:
    (tmp_path / "outer" / "inner").mkdir(parents=True)
    (tmp_path / "outer" / "inner" / "rewards.py").write_text("def score(completion, answer):\n    return 1.0\n")
    config.verifier.name = "outer.inner.rewards:score"
    assert "verifier.name (rewards.py)" in fingerprints(config)
    config.verifier.name = "outer.missing.rewards:score"
    assert not any(key.startswith("verifier.name") for key in fingerprints(config))
