"""A fault on one rank: every rank skips the update, and weights and optimizer state keep their bits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.processes import ROOT, fork
from tests.small_model import make_small_model
from tests.update_faults import FAULTS

LAYOUTS = {
    "dp4": {},
    "dp4-zero": {"distributed_optimizer": True},
    "tp2-sp-pp2": {"tensor": 2, "sequence": True, "pipeline": 2},
    "pp2-dp2-zero": {"pipeline": 2, "distributed_optimizer": True},
    "pp2-interleaved-dp2": {"pipeline": 2, "virtual_pipeline": 2},
    "cp2-tp2": {"context": 2, "tensor": 2},
    "moe-ep2-pp2": {"expert": 2, "pipeline": 2, "mixture": True},
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory, small_model: Path) -> dict[str, list[dict]]:
    """What every rank found, by layout; four processes visit all layouts."""
    folder = tmp_path_factory.mktemp("faults")
    mixture = make_small_model(folder / "mixture", mixture=True)
    program = [str(ROOT / "tests" / "update_faults.py"), str(small_model), str(mixture), str(folder)]
    fork([*program, *map(json.dumps, LAYOUTS.values())], 4)
    return {
        name: [json.loads((folder / f"{number}-{rank}.json").read_text()) for rank in range(4)]
        for number, name in enumerate(LAYOUTS)
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_rank_skips_and_keeps_its_bits(layout: str, outcomes: dict[str, list[dict]]) -> None:
    for found in outcomes[layout]:
        assert found == {name: [False, True] for name in (*FAULTS, "as if nothing had been")}
