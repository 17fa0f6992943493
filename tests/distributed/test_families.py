"""Every model family in every kind of parallel layout, tested against transformers in float64."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_rlvr.data.batch import RolloutBatch
from megatron_rlvr.megatron import parallel
from megatron_rlvr.megatron.config import ParallelConfig
from megatron_rlvr.rollout.engines.local import LocalEngine
from megatron_rlvr.rollout.sampling import SamplingSettings
from megatron_rlvr.weights.export import export_folder
from megatron_rlvr.weights.loading import check_folder, load_folder
from tests.families import (
    CHOICE_BIAS,
    FAMILIES,
    MIXTURES,
    TEMPERATURE,
    THREE_LAYERS,
    Measurement,
    make_batch,
    make_families,
    measure,
    reference,
)
from tests.generation import generate
from tests.processes import ROOT, launch

LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": {"tensor": 2},
    "tp2-sp": {"tensor": 2, "sequence": True},
    "pp2": {"pipeline": 2},
    "cp2": {"context": 2},
}
MIXTURE_LAYOUTS: dict[str, dict[str, Any]] = {
    "ep2": {"expert": 2},
    "tp2-sp-ep2": {"tensor": 2, "sequence": True, "expert": 2},
    "tp2-sp-etp2": {"tensor": 2, "sequence": True, "expert_tensor": 2},
    "moe-pp2": {"pipeline": 2},
    "cp2-ep2": {"context": 2, "expert": 2},
    "ep2-recompute": {"expert": 2, "recompute": "full"},
    "cp2-packed": {"context": 2, "microbatch_tokens": 256},
    "uneven-pp2": {"pipeline": 2, "last_stage_layers": 1},
}
MIXTURE_LAYOUTS_OF_4: dict[str, dict[str, Any]] = {
    "pp2-ep2": {"pipeline": 2, "expert": 2},
    "tp2-ep4": {"tensor": 2, "sequence": True, "expert": 4},
}
# The reference computes a load-balancing loss over padded microbatches, and other families rotate packed sequences as
# megatron-core does.
ONLY = {"cp2-packed": ["deepseek-v3", "moonlight"], "uneven-pp2": [THREE_LAYERS]}


def families_of(layout: str, families: Collection[str]) -> Collection[str]:
    return ONLY.get(layout, families)


CASES = [
    *((family, layout) for family in FAMILIES for layout in LAYOUTS),
    *(
        (family, layout)
        for layout in MIXTURE_LAYOUTS | MIXTURE_LAYOUTS_OF_4
        for family in families_of(layout, MIXTURES)
    ),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_families(tmp_path_factory.mktemp("families"))


@pytest.fixture(scope="module")
def references(folders: Path) -> dict[str, Measurement]:
    return {name: reference(folders / name) for name in [*FAMILIES, *MIXTURES, THREE_LAYERS]}


@pytest.fixture(scope="module")
def single() -> Iterator[parallel.Layout]:
    with parallel.parallel_groups(ParallelConfig(), seed=0) as layout:
        yield layout


@pytest.fixture(scope="module")
def measured(folders: Path) -> Callable[[str], Path]:
    """Returns the folder of a layout's measurements. A group is measured when its first layout is requested."""
    groups = ((2, FAMILIES, LAYOUTS), (2, MIXTURES, MIXTURE_LAYOUTS), (4, MIXTURES, MIXTURE_LAYOUTS_OF_4))
    output = folders / "measured"

    def folder_of(layout: str) -> Path:
        if not (output / layout).exists():
            processes, families, layouts = next(group for group in groups if layout in group[2])
            jobs = [
                json.dumps({"name": n, "layout": s, "folders": [str(folders / f) for f in families_of(n, families)]})
                for n, s in layouts.items()
            ]
            launch([str(ROOT / "tests" / "families.py"), str(output), *jobs], processes, check=True)
        return output / layout

    return folder_of


def agree(found: Measurement, expected: Measurement) -> None:
    """Weights agree bit for bit; log-probs, entropies and all gradients up to float32 rounding."""
    for name, tensor in found.weights.items():
        assert tensor.equal(expected.weights[name]), name
    with_gradient = {name for name in found.weights if not name.endswith(CHOICE_BIAS)}
    assert set(expected.gradients) == set(found.gradients) == with_gradient
    assert (found.logprob - expected.logprob).abs().max() < 2e-5
    assert (found.entropy - expected.entropy).abs().max() < 2e-5
    assert found.grad_norm == pytest.approx(expected.grad_norm, rel=1e-5)
    for name, gradient in expected.gradients.items():
        assert (found.gradients[name] - gradient).norm() < 1e-5 * gradient.norm() + 1e-7, name


@pytest.mark.parametrize("name", FAMILIES | MIXTURES)
def test_one_process(
    name: str, folders: Path, references: dict[str, Measurement], single: parallel.Layout, tmp_path: Path
) -> None:
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    found, policy = measure(folders / name, ParallelConfig(), single)
    agree(found, references[name])
    tokens = make_batch().tokens[:, :40]
    model = AutoModelForCausalLM.from_pretrained(folders / name, experts_implementation="eager").double()
    with torch.no_grad():
        expected = model(tokens).logits.transpose(0, 1).flatten(0, 1)
        load_folder(policy.bridge, policy.model_chunks, check_folder(policy.bridge))  # undo the update
        logits = policy.model_chunks[-1](tokens)
    assert (logits - expected).abs().max() < 2e-5 * expected.abs().max()
    _check_generation(policy)
    export_folder(policy.bridge, policy.model_chunks, tmp_path / "saved", write=True)
    saved, original = (load_file(f / "model.safetensors") for f in (tmp_path / "saved", folders / name))
    assert saved.keys() == original.keys() and all(saved[key].equal(original[key]) for key in original)


def _check_generation(policy: Any) -> None:
    """The local engine reports the log-probs that a scoring pass computes, with prompts of several lengths."""
    prompts = [list(range(3, 30)), [5, 9], [70, 40, 33, 21]]
    sampling = SamplingSettings(samples=2, max_tokens=12, temperature=TEMPERATURE)
    completions = generate(LocalEngine(policy.model_chunks, batch=4), prompts, sampling)
    batch = RolloutBatch.from_completions(prompts, completions, [0.0] * 6, padding=0)
    scores = policy.score(batch, torch.ones(6))
    assert (scores.logprob - batch.rollout_logprob).abs().max() < 2e-5


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_layout(name: str, layout: str, measured: Callable[[str], Path], references: dict[str, Measurement]) -> None:
    agree(Measurement(**torch.load(measured(layout) / f"{name}.pt")), references[name])
