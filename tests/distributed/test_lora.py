"""Adapters in every kind of parallel layout are those that one process trains."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_rlvr.megatron import parallel
from megatron_rlvr.megatron.config import ParallelConfig
from megatron_rlvr.training.checkpoint import Checkpoints
from megatron_rlvr.training.config import CheckpointConfig
from megatron_rlvr.training.policy import Policy
from tests.families import ADVANTAGE, make_batch, make_family
from tests.lora_layouts import config, run, update
from tests.processes import ROOT, launch

DENSE, MIXTURE, ALL_EXPERTS = "qwen2-tied", "deepseek-v3", "qwen3-moe"
# A rank without adapters outside experts has an optimizer without parameters.
LORA = {ALL_EXPERTS: {"target_modules": ["gate_proj", "up_proj"]}}
SEQUENCE: dict[str, Any] = {"tensor": 2, "sequence": True}
JOBS: dict[str, tuple[str, dict[str, Any]]] = {
    "tp2": (DENSE, {"tensor": 2}),
    "tp2-sp-recompute": (DENSE, {**SEQUENCE, "recompute": "full"}),
    "pp2": (DENSE, {"pipeline": 2}),
    "cp2": (DENSE, {"context": 2}),
    "dp2-zero": (DENSE, {"distributed_optimizer": True}),
    "ep2-zero": (MIXTURE, {"expert": 2, "distributed_optimizer": True}),
    "tp2-sp-ep2": (MIXTURE, {**SEQUENCE, "expert": 2}),
    "tp2-sp-etp2": (MIXTURE, {**SEQUENCE, "expert_tensor": 2}),
    "moe-pp2-recompute": (MIXTURE, {"pipeline": 2, "recompute": "selective", "recompute_modules": ["moe"]}),
}
SAVED = {"experts-alone-ep2-zero": (ALL_EXPERTS, {"expert": 2, "distributed_optimizer": True})}
RESUMED = {"resumed-tp2-sp": (DENSE, SEQUENCE), "resumed-pp2-ep2": (MIXTURE, {"pipeline": 2})}

ALL_JOBS = JOBS | SAVED | RESUMED


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lora")


@pytest.fixture(scope="module")
def single(folder: Path) -> Iterator[dict[str, Any]]:
    """What one process trains; it also writes a checkpoint after the first update."""
    results = {}
    with parallel.parallel_groups(ParallelConfig(), seed=0) as here:
        for model in (DENSE, MIXTURE):
            results[model] = run({"model": str(make_family(folder / model, model)), "layout": {}}, here)
            policy = Policy(config(folder / model, ParallelConfig()), here)
            update(policy, here, policy.score(make_batch(), ADVANTAGE))
            (checkpoints := Checkpoints(folder / f"{model}-checkpoints", CheckpointConfig())).save(1, policy, {}, {})
            checkpoints.finish()
        model = make_family(folder / ALL_EXPERTS, ALL_EXPERTS)
        results[ALL_EXPERTS] = run({"model": str(model), "layout": {}, "lora": LORA[ALL_EXPERTS]}, here)
        yield results


@pytest.fixture(scope="module")
def layouts(folder: Path, single: dict[str, Any]) -> Path:
    jobs = []
    for name, (model, layout) in ALL_JOBS.items():
        job = {"model": str(folder / model), "layout": layout, "output": str(folder / f"{name}.pt")}
        job["lora"] = LORA.get(model, {})
        if name in RESUMED:
            job["resume"] = str(folder / f"{model}-checkpoints")
        if name in SAVED:
            job["save"] = str(folder / f"{name}-checkpoints")
        jobs.append(json.dumps(job))
    launch([str(ROOT / "tests" / "lora_layouts.py"), *jobs], processes=2, check=True)
    return folder


@pytest.mark.parametrize("name", ALL_JOBS)
def test_a_layout_trains_the_adapters_of_one_process(name: str, layouts: Path, single: dict[str, Any]) -> None:
    expected, found = single[ALL_JOBS[name][0]], torch.load(layouts / f"{name}.pt")
    count = len(found["grad_norms"])
    assert found["grad_norms"] == pytest.approx(expected["grad_norms"][-count:], rel=1e-5)
    assert (found["after"] - expected["after"]).abs().max() < 1e-5 < (expected["after"] - expected["base"]).abs().max()
    if name in JOBS:
        assert torch.allclose(found["before"], found["base"], atol=1e-6)
    for kind in ("adapters", "merged"):
        assert found[kind].keys() == expected[kind].keys()
        for key, tensor in expected[kind].items():
            assert (found[kind][key] - tensor).norm() <= 1e-5 * tensor.norm(), key
