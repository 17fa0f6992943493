"""Adapters in every kind of parallel layout are those that one process trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

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
ALONE: dict[str, tuple[str, dict[str, Any]]] = {
    f"{model}-alone": (model, {}) for model in (DENSE, MIXTURE, ALL_EXPERTS)
}
SAVED = {
    "experts-alone-ep2-zero": (ALL_EXPERTS, {"expert": 2, "distributed_optimizer": True}),
    **{f"{model}-saved": (model, {}) for model in (DENSE, MIXTURE)},
}
RESUMED = {"resumed-tp2-sp": (DENSE, SEQUENCE), "resumed-pp2-ep2": (MIXTURE, {"pipeline": 2})}
ALL_JOBS = JOBS | SAVED | RESUMED


def jobs(folders: Path) -> list[dict[str, Any]]:
    """Two processes train in every layout, and one process without a layout, before checkpoints of it are loaded."""
    result = []
    for name, (model, layout) in (ALONE | SAVED | JOBS | RESUMED).items():
        job = {"program": "lora_layouts", "ranks": [2, 3] if layout else [2], "name": name, "layout": layout}
        job |= {"model": str(folders / model), "lora": LORA.get(model, {})}
        if name in SAVED:
            job["save"] = str(folders / f"{name}-checkpoints")
        if name in RESUMED:
            job["resume"] = str(folders / f"{model}-saved-checkpoints")
        result.append(job)
    return result


@pytest.mark.parametrize("name", ALL_JOBS)
def test_a_layout_trains_the_adapters_of_one_process(name: str, measured: Path) -> None:
    expected, found = (torch.load(measured / f"{n}.pt") for n in (f"{ALL_JOBS[name][0]}-alone", name))
    count = len(found["grad_norms"])
    assert found["grad_norms"] == pytest.approx(expected["grad_norms"][-count:], rel=1e-5)
    assert (found["after"] - expected["after"]).abs().max() < 1e-5 < (expected["after"] - expected["base"]).abs().max()
    if name in JOBS:
        assert torch.allclose(found["before"], found["base"], atol=1e-6)
    for kind in ("adapters", "merged"):
        assert found[kind].keys() == expected[kind].keys()
        for key, tensor in expected[kind].items():
            assert (found[kind][key] - tensor).norm() <= 1e-5 * tensor.norm(), key
