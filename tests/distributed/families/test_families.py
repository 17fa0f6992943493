"""Every model family in every kind of parallel layout, tested against transformers in float64."""

from __future__ import annotations

from collections.abc import Collection, Iterator
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
    FAMILIES,
    MIXTURES,
    TEMPERATURE,
    THREE_LAYERS,
    Measurement,
    agree,
    make_batch,
    measure,
    reference,
)
from tests.generation import generate

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


def jobs(folders: Path) -> list[dict[str, Any]]:
    groups = (
        ([0, 1, 2, 3], MIXTURES, MIXTURE_LAYOUTS_OF_4),
        ([0, 1], FAMILIES, LAYOUTS),
        ([2, 3], MIXTURES, MIXTURE_LAYOUTS),
    )
    return [
        {"program": "families", "ranks": ranks, "name": name, "layout": layout}
        | {"folders": [str(folders / family) for family in families_of(name, families)]}
        for ranks, families, layouts in groups
        for name, layout in layouts.items()
    ]


@pytest.fixture(scope="module")
def references(folders: Path) -> dict[str, Measurement]:
    return {name: reference(folders / name) for name in [*FAMILIES, *MIXTURES, THREE_LAYERS]}


@pytest.fixture(scope="module")
def single() -> Iterator[parallel.Layout]:
    with parallel.parallel_groups(ParallelConfig(), seed=0) as layout:
        yield layout


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
def test_layout(name: str, layout: str, measured: Path, references: dict[str, Measurement]) -> None:
    agree(Measurement(**torch.load(measured / layout / f"{name}.pt")), references[name])
