"""Routes are replayed in every kind of parallel layout, tested against transformers in float64 with the same routes."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_rlvr.data.routes import RouterShape
from megatron_rlvr.megatron import parallel
from megatron_rlvr.megatron.config import ParallelConfig
from tests.families import MIXTURES, Measurement, has_aux_loss, make_family, measure, reference
from tests.processes import ROOT, launch

LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2-sp-ep2": {"tensor": 2, "sequence": True, "expert": 2},
    # The first stage of GLM-4.5 has no router.
    "pp2-recompute": {"pipeline": 2, "recompute": "full"},
    "cp2-packed-recompute-moe": {
        "context": 2,
        "microbatch_tokens": 150,
        "recompute": "selective",
        "recompute_modules": ["moe"],
    },
}
DISTRIBUTED = ("qwen3-moe", "glm4-moe", "deepseek-v3")
ROUTERS = {
    name: RouterShape(
        layers=2,
        routed=(1,) if "first_k_dense_replace" in settings else (0, 1),
        experts=8 if name == "deepseek-v3" else 4,
        chosen=2,
    )
    for name, settings in MIXTURES.items()
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixtures")
    for name in MIXTURES:
        make_family(folder / name, name)
    return folder


@pytest.fixture(scope="module")
def expected(folder: Path) -> Callable[[str, bool], Measurement]:
    """Returns what transformers computes of a family, with or without the load-balancing loss, if it has one."""

    @functools.cache
    def computed(name: str, aux_loss: bool) -> Measurement:
        return reference(folder / name, ROUTERS[name], aux_loss)

    return lambda name, aux_loss: computed(name, aux_loss and has_aux_loss(folder / name))


@pytest.fixture(scope="module")
def measured(folder: Path) -> Path:
    folders = [str(folder / name) for name in DISTRIBUTED]
    jobs = [{"name": name, "layout": layout, "folders": folders, "replay": True} for name, layout in LAYOUTS.items()]
    launch([str(ROOT / "tests" / "families.py"), str(folder / "measured"), *map(json.dumps, jobs)], 2, check=True)
    return folder / "measured"


@pytest.fixture(scope="module")
def single() -> Iterator[parallel.Layout]:
    with parallel.parallel_groups(ParallelConfig(), seed=0) as layout:
        yield layout


def agree(found: Measurement, expected: Measurement) -> None:
    """Log-probs, entropies and all gradients agree up to float32 rounding, those of the routers among them."""
    assert (found.logprob - expected.logprob).abs().max() < 2e-5
    assert (found.entropy - expected.entropy).abs().max() < 2e-5
    assert found.grad_norm == pytest.approx(expected.grad_norm, rel=1e-5)
    for name, gradient in expected.gradients.items():
        assert gradient.abs().max() > 0 and (found.gradients[name] - gradient).abs().max() < 1e-5, name


@pytest.mark.parametrize("name", MIXTURES)
def test_one_process(name: str, folder: Path, expected: Callable, single: parallel.Layout) -> None:
    found, policy = measure(folder / name, ParallelConfig(recompute="full"), single, replay=True)
    assert policy.routers == ROUTERS[name]
    agree(found, expected(name, True))
    without, _ = measure(folder / name, ParallelConfig(), single)
    assert (found.logprob - without.logprob).abs().mean() > 1e-2


@pytest.mark.parametrize("name", DISTRIBUTED)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout(name: str, layout: str, measured: Path, expected: Callable) -> None:
    found = Measurement(**torch.load(measured / layout / f"{name}.pt"))
    agree(found, expected(name, "microbatch_tokens" not in LAYOUTS[layout]))
