"""Every model family in every kind of layout against transformers in float64."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_rlvr.backend import parallel
from megatron_rlvr.config import ParallelConfig
from tests.conftest import ROOT, launch
from tests.families import FAMILIES, Measurement, make_batch, make_family, measure, reference

LAYOUTS = {"tp2": {"tensor": 2}, "tp2-sp": {"tensor": 2, "sequence": True}, "pp2": {"pipeline": 2}}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("families")
    for name in FAMILIES:
        make_family(folder / name, name)
    return folder


@pytest.fixture(scope="module")
def references(folders: Path) -> dict[str, Measurement]:
    return {name: reference(folders / name) for name in FAMILIES}


@pytest.fixture(scope="module")
def single() -> Iterator[parallel.Layout]:
    with parallel.parallel_groups(ParallelConfig(), seed=0) as layout:
        yield layout


@pytest.fixture(scope="module")
def measured(folders: Path) -> Path:
    """``<layout number>/<family>.pt``, from two processes that went through all of them."""
    output = folders / "measured"
    layouts = [json.dumps(layout) for layout in LAYOUTS.values()]
    names = [str(folders / name) for name in FAMILIES]
    launch([str(ROOT / "tests" / "families.py"), str(output), *layouts, "--", *names], 2, check=True)
    return output


def agree(found: Measurement, expected: Measurement) -> None:
    """Weights bit for bit; log-probs, entropies and every gradient to float32 rounding."""
    for name, tensor in found.weights.items():
        assert tensor.equal(expected.weights[name]), name
    assert set(expected.gradients) == set(found.gradients) == set(found.weights)
    assert (found.logprob - expected.logprob).abs().max() < 2e-5
    assert (found.entropy - expected.entropy).abs().max() < 2e-5
    assert found.grad_norm == pytest.approx(expected.grad_norm, rel=1e-5)
    for name, gradient in expected.gradients.items():
        assert (found.gradients[name] - gradient).norm() < 1e-5 * gradient.norm() + 1e-7, name


@pytest.mark.parametrize("name", FAMILIES)
def test_one_process(
    name: str, folders: Path, references: dict[str, Measurement], single: parallel.Layout, tmp_path: Path
) -> None:
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    found, policy = measure(folders / name, ParallelConfig(), single)
    agree(found, references[name])
    tokens = make_batch().tokens[:, :40]
    model = AutoModelForCausalLM.from_pretrained(folders / name).double()
    with torch.no_grad():
        expected = model(tokens).logits.transpose(0, 1).flatten(0, 1)
        policy.bridge.load(policy.model)  # undo the update
        logits = policy.model(tokens)
    assert (logits - expected).abs().max() < 2e-5 * expected.abs().max()
    policy.bridge.save(policy.model, tmp_path / "saved", write=True)
    saved, given = (load_file(f / "model.safetensors") for f in (tmp_path / "saved", folders / name))
    assert saved.keys() == given.keys() and all(saved[key].equal(given[key]) for key in given)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", FAMILIES)
def test_layout(name: str, layout: str, measured: Path, references: dict[str, Measurement]) -> None:
    number = list(LAYOUTS).index(layout)
    agree(Measurement(**torch.load(measured / str(number) / f"{name}.pt")), references[name])
