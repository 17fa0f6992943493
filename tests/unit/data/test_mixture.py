"""Prompts of several data sets with weights: shares, epochs, strata, and their metrics."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from megatron_rlvr.config import load_config
from megatron_rlvr.data import Example, MixtureSampler, PromptSampler
from megatron_rlvr.data.config import DataConfig, DataSource
from megatron_rlvr.errors import UserError
from megatron_rlvr.rollout.prompts import PromptSet
from megatron_rlvr.run_inputs import fingerprints

COUNTS, WEIGHTS = (50, 7, 400), (3.0, 0.1, 0.9)


def mixture(seed: int, per_step: int = 24, strata=None) -> MixtureSampler:
    return MixtureSampler(COUNTS, WEIGHTS, ("a", "b", "c"), per_step, seed, strata)


@pytest.mark.parametrize("seed", [0, 1, 17])
@pytest.mark.parametrize("per_step", [1, 5, 24])
def test_every_step_has_the_shares_of_the_weights(seed: int, per_step: int) -> None:
    sampler = mixture(seed, per_step)
    shares = np.array(WEIGHTS) / sum(WEIGHTS)
    total = np.zeros(3)
    for step in range(400):
        drawn = Counter(sampler.source(index) for index in sampler.indices(step))
        own = np.array([drawn[source] for source in range(3)])
        assert own.sum() == per_step and sampler.drawn(step, step + 1) == own.tolist()
        assert (abs(own - per_step * shares) < 1).all()  # rounded down or up
        total += own
        assert (abs(total - per_step * shares * (step + 1)) < 4).all()
    assert sampler.drawn(0, 400) == total.tolist()


@pytest.mark.parametrize("seed", [0, 1, 17])
def test_every_source_has_epochs_of_its_own(seed: int) -> None:
    sampler = mixture(seed)
    first = (0, 50, 57, 457)
    drawn = [index for step in range(120) for index in sampler.indices(step)]
    # Within a step the order is shuffled, so only the steps' sets of prompts tell which epoch a prompt is of.
    for source, count in enumerate(COUNTS):
        own = Counter(index for index in drawn if first[source] <= index < first[source + 1])
        assert len(own) == min(count, own.total()) and max(own.values()) - min(own.values()) <= 1
        assert sampler.epochs(120)[source] == pytest.approx(own.total() / count)
    orders = [[i for i in sampler.indices(step) if i < 50] for step in range(2)]
    assert len({*orders[0], *orders[1]}) == len(orders[0]) + len(orders[1])  # one epoch goes on over steps


def test_a_step_depends_on_seed_and_step_alone() -> None:
    expected = [mixture(3).indices(step) for step in range(12)]
    backwards = mixture(3)
    assert [backwards.indices(step) for step in reversed(range(12))] == expected[::-1]
    assert mixture(4).indices(0) != expected[0]
    assert any(np.diff([mixture(3).source(index) for index in indices]).min() < 0 for indices in expected)  # mixed


def test_one_source_has_the_epochs_of_a_data_set_alone() -> None:
    alone, mixed = PromptSampler(50, 8, 3), MixtureSampler((50,), (7.0,), ("a",), 8, 3)
    assert [sorted(mixed.indices(step)) for step in range(20)] == [sorted(alone.indices(step)) for step in range(20)]


@pytest.mark.parametrize("seed", [0, 1, 17])
def test_sources_are_stratified_each_by_itself(seed: int) -> None:
    strata = [float((7 * i) % 96) for i in range(96)] * 2
    sampler = MixtureSampler((96, 96), (1.0, 3.0), ("a", "b"), 16, seed, strata)
    for step in range(48):
        indices = sampler.indices(step)
        assert sorted(strata[i] // 24 for i in indices if i < 96) == [0, 1, 2, 3]
        assert sorted(strata[i] // 8 for i in indices if i >= 96) == list(range(12))


def test_replacements_have_the_shares_of_the_weights() -> None:
    sampler = mixture(0)
    drawn = Counter(sampler.source(sampler.replacement(draw)) for draw in range(4000))
    for source, weight in enumerate(WEIGHTS):
        share = weight / sum(WEIGHTS)
        assert abs(drawn[source] / 4000 - share) < 4 * math.sqrt(share * (1 - share) / 4000)
    assert sampler.replacement(5) == mixture(1).replacement(5)


def test_a_source_smaller_than_its_share_is_refused() -> None:
    with pytest.raises(UserError, match=r"b has 7 examples, but its weight is 8 of rollout\.prompts_per_step=16"):
        MixtureSampler((50, 7), (1.0, 1.0), ("a", "b"), 16, 0)
    MixtureSampler((50, 8), (0.7, 0.7), ("a", "b"), 16, 0)  # exactly


def prompt_set(strata: list[float | None]) -> PromptSet:
    examples = [Example(i, "p", 1, "file", stratum) for i, stratum in enumerate(strata)]
    return PromptSet(examples, [[1]] * len(strata), ("a", "b"), (3, 2))


def test_strata_of_sources_follow_each_other() -> None:
    assert prompt_set([3.0, 1.0, 2.0, 2.0, 1.0]).strata == [2.0, 0.0, 1.0, 4.0, 3.0]
    assert prompt_set([None] * 5).strata == [0.0, 1.0, 2.0, 3.0, 4.0]  # neighbours are of one source
    alone = dataclasses.replace(prompt_set([None] * 5), sources=(), sizes=())
    assert alone.strata is None and isinstance(alone.sampler([1.0], 2, 0), PromptSampler)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("[]", "data.train=.. has no files"),
        ("[{weight: 1}]", r"data.train\[0\].path is not set"),
        ("[{path: a.jsonl, weight: 0}]", r"data.train\[0\].weight must be at least 1e-06, not 0"),
        ("[{path: a.jsonl, weight: .inf}]", "must be a finite number"),
        ("[{path: a.jsonl, wieght: 1}]", r"did you mean data.train\[0\].weight"),
        ("[a.jsonl, x/a.jsonl]", "2 files of data.train are called a: give each of them another name"),
        ("[{path: a b.jsonl}]", r"set data.train\[0\].name"),
        ("[[a]]", r"data.train\[0\] must be a section: write {path: ..., ...}"),
    ],
)
def test_impossible_lists_of_sources(run_yaml: Path, value: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config(run_yaml, [f"data.train={value}"])


def test_a_list_is_read_from_a_file_and_from_an_override(run_yaml: Path) -> None:
    expected = [DataSource("a.jsonl", 0.7), DataSource("01.jsonl", 0.3, "other")]
    written = "[{path: a.jsonl, weight: 0.7}, {path: 01.jsonl, weight: 3e-1, name: other}]"
    assert load_config(run_yaml, [f"data.train={written}"]).data.train == expected
    run_yaml.write_text(run_yaml.read_text().replace("data: {train: ", f"data: {{train: {written}, prompt_key: "))
    assert load_config(run_yaml).data.train == expected
    assert load_config(run_yaml, ["data.train=[a.jsonl, b.jsonl]"]).data.train == [
        DataSource("a.jsonl"),
        DataSource("b.jsonl"),
    ]
    assert load_config(run_yaml, ['data.train="[a].jsonl"']).data.sources() == [DataSource("[a].jsonl")]


def test_every_file_has_a_fingerprint(run_yaml: Path, tmp_path: Path) -> None:
    """Files of one name in two folders are told apart."""
    paths = [tmp_path / folder / "train.jsonl" for folder in "ab"]
    for path in paths:
        path.parent.mkdir()
        path.write_text(json.dumps({"prompt": path.parent.name, "answer": 1}))
    train = [DataSource(str(path), name=path.parent.name) for path in paths]
    config = load_config(run_yaml)
    config.data = DataConfig(train=train)
    before = fingerprints(config)
    assert {"data.train (a: train.jsonl)", "data.train (b: train.jsonl)"} <= set(before)
    paths[1].write_text(json.dumps({"prompt": "c", "answer": 1}))
    changed = [key for key, digest in fingerprints(config).items() if digest != before[key]]
    assert changed == ["data.train (b: train.jsonl)"]
