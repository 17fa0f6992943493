"""The plan's static memory is within 1 % of what a real policy allocates, and its peak within 10 %."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_rlvr.megatron.stage_shapes import model_stages
from megatron_rlvr.planning.memory import phase_memory, static_memory
from tests.families import make_family
from tests.processes import ROOT, fork
from tests.static_memory import layout_config

LAYOUTS: dict[str, dict[str, Any]] = {
    "dp2-float32": {"dtype": "float32"},
    "dp2-bfloat16": {"dtype": "bfloat16"},
    "dp2-float32-distributed": {"dtype": "float32", "distributed_optimizer": True},
    "dp2-bfloat16-distributed": {"dtype": "bfloat16", "distributed_optimizer": True},
    "tp2-sp": {"dtype": "bfloat16", "tensor": 2, "sequence": True},
    "pp2-tied": {"dtype": "bfloat16", "pipeline": 2},
    "pp2-tied-distributed": {"dtype": "float32", "pipeline": 2, "distributed_optimizer": True},
    "tp2": {"dtype": "float32", "tensor": 2},
    "pp2-microbatches": {"dtype": "float32", "pipeline": 2, "microbatch_sequences": 2},
    "cp2": {"dtype": "float32", "context": 2},
    "dp2-recompute": {"dtype": "float32", "recompute": "full"},
    "lora-dp2-bfloat16-distributed": {"dtype": "bfloat16", "lora_rank": 24, "distributed_optimizer": True},
    "lora-tp2-sp": {"dtype": "bfloat16", "lora_rank": 24, "tensor": 2, "sequence": True},
    "dp2-packed": {"dtype": "float32", "microbatch_sequences": 0, "microbatch_tokens": 640},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("memory")
    # Large compared with the batch, of which megatron-core keeps the last microbatch; the static memory excludes that.
    return make_family(folder / "model", "llama3-tied", hidden_size=192, intermediate_size=1536, vocab_size=2048)


@pytest.fixture(scope="module")
def measured(folder: Path) -> Path:
    """The folder of ``<layout number>-<rank>.json``, written by two real processes."""
    program = [str(ROOT / "tests" / "static_memory.py"), str(folder), str(folder.parent)]
    fork([*program, *map(json.dumps, LAYOUTS.values())], 2)
    return folder.parent


@pytest.mark.parametrize("name", LAYOUTS)
def test_memory(name: str, folder: Path, measured: Path) -> None:
    config = layout_config(folder, LAYOUTS[name])
    data_parallel = 2 // (config.parallel.tensor * config.parallel.pipeline * config.parallel.context)
    shape, dtype, stages = model_stages(config.model, config.parallel, 2, config.lora)
    for rank in range(2):
        found = json.loads((measured / f"{list(LAYOUTS).index(name)}-{rank}.json").read_text())
        stage = stages[found["stage"]]
        static = static_memory(stage, config.parallel, dtype, data_parallel).total
        assert found["bytes"] == pytest.approx(static, rel=0.01), (rank, found["bytes"] / static)
        update = phase_memory(shape, stage, config, dtype.itemsize, data_parallel).update
        assert found["peak"] > 1.3 * found["bytes"]  # otherwise 10 % of the peak would allow for any update
        assert found["peak"] == pytest.approx(static + update, rel=0.1), (rank, found["peak"] / (static + update))
