"""The state of the distributed optimizer: every rank saves and loads its own slices, in any layout, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint import load as load_torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from tests.processes import ROOT, fork
from tests.small_model import make_small_model

# By kind of model, layouts of four processes. Each but the first also loads what the first one saved.
KINDS: dict[str, dict[str, dict[str, Any]]] = {
    "float32": {
        "earlier-dp4": {},
        "dp4": {},
        "tp2-dp2": {"tensor": 2},
        "pp2-dp2": {"pipeline": 2},
        "pp2-interleaved-tp2-sp": {"pipeline": 2, "virtual_pipeline": 2, "tensor": 2, "sequence": True},
        "cp2-dp2": {"context": 2},
    },
    "bfloat16": {"bf16-dp4": {}, "bf16-tp2-dp2": {"tensor": 2}, "bf16-pp2-dp2": {"pipeline": 2}},
    "mixture": {
        "moe-ep2-dp2": {"expert": 2},
        "moe-tp2-sp-ep2": {"tensor": 2, "sequence": True, "expert": 2},
        "moe-pp2-ep2": {"pipeline": 2, "expert": 2},
    },
}
CASES = {
    name: {
        "name": name,
        "layout": layout,
        "dtype": "bfloat16" if kind == "bfloat16" else "float32",
        "mixture": kind == "mixture",
        "earlier": name.startswith("earlier"),
        "source": "" if name == next(iter(layouts)) else next(iter(layouts)),
    }
    for kind, layouts in KINDS.items()
    for name, layout in layouts.items()
}
NEW = [name for name, case in CASES.items() if not case["earlier"]]


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory, small_model: Path) -> Path:
    """The folder of four processes, which visit all cases."""
    folder = tmp_path_factory.mktemp("slices")
    mixture = make_small_model(folder / "mixture", mixture=True)
    program = [str(ROOT / "tests" / "optimizer_slices.py"), str(small_model), str(mixture), str(folder)]
    fork([*program, *map(json.dumps, CASES.values())], 4)
    return folder


def found(output: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads((output / f"{name}-{rank}.json").read_text()) for rank in range(4)]


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, whole."""
    metadata = FileSystemReader(folder).read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    load_torch(tensors, storage_reader=FileSystemReader(folder), no_dist=True)
    return tensors


@pytest.mark.parametrize("name", CASES)
def test_a_resume_in_the_same_layout_is_bit_equal(name: str, output: Path) -> None:
    for rank in found(output, name):
        assert rank["same state"] and rank["same state an update later"]


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case["source"]])
def test_another_layout_loads_every_bit(name: str, output: Path) -> None:
    source, again = stored(output / CASES[name]["source"] / "step_2"), stored(output / f"{name}-again" / "step_2")
    assert source.keys() == again.keys()
    assert all(again[key].equal(tensor) for key, tensor in source.items())
    for moment in ("exp_avg", "exp_avg_sq", "param"):
        of_state = [tensor for key, tensor in source.items() if key.startswith(f"optimizer.state.{moment}.")]
        assert len(of_state) > 8 and all(tensor.dtype == torch.float32 and tensor.any() for tensor in of_state)


@pytest.mark.parametrize("name", NEW)
def test_ranks_exchange_no_tensors_and_hold_their_own_state(name: str, output: Path) -> None:
    ranks = found(output, name)
    for rank in ranks:
        assert max(rank["exchanged to save"], rank["exchanged to load"]) < 10  # flags: has every rank succeeded?
    # Three tensors of each parameter, once in every data-parallel group.
    layout = CASES[name]["layout"]
    groups = layout.get("tensor", 1) * layout.get("pipeline", 1)
    if not CASES[name]["mixture"]:
        assert sum(r["loaded elements"] for r in ranks) == 3 * sum(r["parameters"] for r in ranks) * groups // 4
    assert max(r["loaded elements"] for r in ranks) <= 3 * max(r["parameters"] for r in ranks)


@pytest.mark.parametrize("name", NEW)
def test_files_hold_every_element_once(name: str, output: Path) -> None:
    folder = output / name / "step_2"
    content = sum(t.numel() * t.element_size() for t in stored(folder).values())
    sizes = sorted(path.stat().st_size for path in folder.glob("*.distcp"))
    assert content < sum(sizes) < 3 * content  # small tensors, each in an archive of its own
    assert len(sizes) == 4
