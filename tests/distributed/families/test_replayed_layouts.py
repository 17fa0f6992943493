"""Routes are replayed in every kind of parallel layout, tested against transformers in float64 with the same routes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_rlvr.data.routes import RouterShape
from megatron_rlvr.megatron import parallel
from megatron_rlvr.megatron.config import ParallelConfig
from tests.families import MIXTURES, Measurement, agree, has_aux_loss, measure, reference

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


def jobs(folders: Path) -> list[dict[str, Any]]:
    of_families = [str(folders / name) for name in DISTRIBUTED]
    settings = {"program": "families", "ranks": [2, 3], "folders": of_families, "replay": True}
    return [settings | {"name": f"replayed-{name}", "layout": layout} for name, layout in LAYOUTS.items()]


@pytest.fixture(scope="module")
def expected(folders: Path) -> Callable[[str, bool], Measurement]:
    """Returns what transformers computes of a family, with or without the load-balancing loss, if it has one."""

    @functools.cache
    def computed(name: str, aux_loss: bool) -> Measurement:
        return reference(folders / name, ROUTERS[name], aux_loss)

    return lambda name, aux_loss: computed(name, aux_loss and has_aux_loss(folders / name))


@pytest.fixture(scope="module")
def single() -> Iterator[parallel.Layout]:
    with parallel.parallel_groups(ParallelConfig(), seed=0) as layout:
        yield layout


def agree_everywhere(found: Measurement, expected: Measurement) -> None:
    """All gradients, those of the routers among them, are not zero and agree in every element."""
    agree(found, expected)
    for name, gradient in expected.gradients.items():
        assert gradient.abs().max() > 0 and (found.gradients[name] - gradient).abs().max() < 1e-5, name


@pytest.mark.parametrize("name", MIXTURES)
def test_one_process(name: str, folders: Path, expected: Callable, single: parallel.Layout) -> None:
    found, policy = measure(folders / name, ParallelConfig(recompute="full"), single, replay=True)
    assert policy.routers == ROUTERS[name]
    agree_everywhere(found, expected(name, True))
    without, _ = measure(folders / name, ParallelConfig(), single)
    assert (found.logprob - without.logprob).abs().mean() > 1e-2


@pytest.mark.parametrize("name", DISTRIBUTED)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout(name: str, layout: str, measured: Path, expected: Callable) -> None:
    found = Measurement(**torch.load(measured / f"replayed-{layout}" / f"{name}.pt"))
    agree_everywhere(found, expected(name, "microbatch_tokens" not in LAYOUTS[layout]))
