"""How YAML and overrides are read: text as it is written, everything else by YAML 1.2."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from megatron_rlvr.config import load_config, save_config
from megatron_rlvr.errors import UserError

VERBATIM = [
    "0123",
    "1e3",
    "1:30",
    "on",
    "yes",
    "1_000",
    "0x1F",
    "1.50",
    "a #1",
    "#1",
    "it's",
    "[a]",
    "{a: b}",
    "a: b",
    "- a",
    "&a",
    "*a",
    "!x",
    "%d",
    "@a",
    "`date`",
    "$(date)",
    "a\nb",
    " a ",
    "über",
    "\\n",
    "2026-01-01",
    "=",
    "?",
]


@pytest.mark.parametrize("text", VERBATIM)
def test_text_is_taken_as_it_is_written(text: str, run_yaml: Path, tmp_path: Path) -> None:
    config = load_config(run_yaml, [f"name={text}"])
    assert config.name == text
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml").name == text


@pytest.mark.parametrize("seed", range(3))
def test_random_names_survive(seed: int, run_yaml: Path, tmp_path: Path) -> None:
    rng = random.Random(seed)
    for _ in range(40):
        text = "/" + "".join(rng.choices("ab01 '\"`$(){}[]#:,-*?&!|>%@~\\;=<ü漢.", k=rng.randrange(1, 12)))
        if "${" in text:
            continue
        config = load_config(run_yaml, [f"run_directory={text}"])
        assert config.run_directory == text
        save_config(config, tmp_path / "saved.yaml")
        assert load_config(tmp_path / "saved.yaml").run_directory == text


def test_text_in_a_file_and_in_lists_keeps_its_digits(run_yaml: Path) -> None:
    run_yaml.write_text(run_yaml.read_text().replace("name: small", "name: 0123"))
    config = load_config(run_yaml, ["rollout.stop=[0123, 1:30, 'a # b', on]", "rollout.sglang.environment.A=0x10"])
    assert config.name == "0123"
    assert config.rollout.stop == ["0123", "1:30", "a # b", "on"]
    assert config.rollout.sglang.environment == {"A": "0x10"}


def test_numbers_truth_values_and_null(run_yaml: Path) -> None:
    overrides = ["steps=010", "optimizer.learning_rate=1e-6", "rollout.record=on", "data.heldout=null",
                 "verifier.options={a: 010, b: 10, c: 1e-3, d: true, e: on, f: ~, g: .inf, h: '1'}"]  # fmt: skip
    config = load_config(run_yaml, overrides)
    assert (config.steps, config.optimizer.learning_rate, config.rollout.record) == (10, 1e-6, True)
    assert config.data.heldout is None
    options = {"a": "010", "b": 10, "c": 1e-3, "d": True, "e": "on", "f": None, "g": float("inf"), "h": "1"}
    assert config.verifier.options == options


def test_a_quoted_override_is_yaml(run_yaml: Path) -> None:
    assert load_config(run_yaml, ["name='null'"]).name == "null"
    assert load_config(run_yaml, ['name="a\\tb"']).name == "a\tb"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("steps=5 # five", "holds a YAML comment"),
        ("rollout.stop=[a #b\n]", "holds a YAML comment"),
        ("name='a'b", "is not valid YAML"),
        ("name=\udcff", "is not UTF-8"),
        ("verifier.options={a: 1, a: 2}", "is there twice"),
        ("steps=" + "[" * 3000, "is not valid YAML"),
        ("run_directory=/tmp/${x}", "Interpolation key 'x' not found"),
    ],
)
def test_what_cannot_be_read_is_refused_in_one_line(override: str, message: str, run_yaml: Path) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_config(run_yaml, [override])
    assert "\n" not in str(caught.value)


def test_anchors_and_merge_keys(run_yaml: Path) -> None:
    options = "workers: 0, options: {<<: {a: 1, b: 2}, b: 3}"
    run_yaml.write_text(run_yaml.read_text().replace("workers: 0", options))
    assert load_config(run_yaml).verifier.options == {"a": 1, "b": 3}


@pytest.mark.parametrize("text", ["steps", "- steps", "a: 1\na: 2", "{a: [}", "? [a]\n: 1"])
def test_a_file_that_holds_no_configuration(text: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        load_config(tmp_path / "run.yaml")
    assert "\n" not in str(caught.value)
