"""What the plan says of a reference policy: bytes against a real one, and seconds against the formulas."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_rlvr.config import Config, load_config, resolve
from megatron_rlvr.megatron.config import LoRAConfig
from megatron_rlvr.megatron.stage_shapes import model_stages
from megatron_rlvr.planning.job import Hardware
from megatron_rlvr.planning.memory import CONTEXT_BYTES, GIB
from megatron_rlvr.planning.plan import Plan, make_plan
from megatron_rlvr.planning.reference import reference_memory
from megatron_rlvr.planning.report import describe
from tests.processes import ROOT

CONFIGS = ROOT / "examples" / "configs"


def plan(folder: Path, *overrides: str) -> Plan:
    config = resolve(load_config(CONFIGS / "llama3.3-70b.yaml", overrides), on_gpu=True)
    config.rollout.sglang.weight_sync = "auto"
    (folder / "config.json").write_text((CONFIGS / "architectures" / "llama3.3-70b.json").read_text())
    config.model.path = str(folder)
    return make_plan(config, 16, 8)


def test_where_the_weights_are_decides_memory_and_time(tmp_path: Path) -> None:
    without = plan(tmp_path)
    on = {
        w: plan(tmp_path, "algorithm.kl_coefficient=0.01", f"reference.weights={w}") for w in ("device", "host", "disk")
    }
    weights = [stage.count * 2 for stage in without.stages]
    for index, held in enumerate(weights):
        assert on["device"].stage_bytes(index) == without.stage_bytes(index) + held
        for name in ("host", "disk"):
            static, phases = on[name].memory[index]
            assert static.total == without.memory[index].static.total
            assert phases.scoring > held and phases.scoring < held + 3 * GIB
            # An update needs more than the reference in this layout, except on the last stage, which keeps little.
            most = max(phases.scoring, phases.update, phases.export)
            held_besides = CONTEXT_BYTES + phases.server + phases.server_runtime
            assert on[name].stage_bytes(index) == static.total + most + held_besides
            assert (most == phases.scoring) == (index == 3)
    score = without.time.score
    assert without.time.reference == 0.0 and on["device"].time.reference == score
    assert on["host"].time.reference == pytest.approx(score + max(weights) / (64e9 * 0.7))
    assert on["disk"].time.reference == pytest.approx(score + 2 * without.shape.parameters / 2e9)
    # Layers exchange activations when policy and reference are scored, and twice in an update.
    assert on["host"].time.tensor_parallel == pytest.approx(without.time.tensor_parallel * 4 / 3)

    texts = {name: describe(planned) for name, planned in on.items()}
    assert "the weights include 4.23 GiB of the reference" in texts["device"]
    assert "read from the disk; it does not set the peak" in texts["disk"]
    per_rank = on["host"].reference_bytes.host
    assert max(weights) < per_rank < 2 * max(weights)
    assert f"copied from {8 * per_rank / GIB:.0f} GiB of host memory per node" in texts["host"]
    assert "reference" not in describe(without)


def test_a_reference_that_sets_the_peak_is_said_to(tmp_path: Path) -> None:
    planned = plan(tmp_path, "algorithm.kl_coefficient=0.01", "parallel.recompute=full", "parallel.pipeline=1")
    static, phases = planned.memory[0]
    assert phases.scoring > phases.update and phases.training == phases.scoring
    assert planned.stage_bytes(0) > static.total + phases.update + phases.server
    assert "it sets the peak" in describe(planned)


def test_adapters_need_no_weights_for_the_model_that_they_start_from(small_model: Path) -> None:
    config = Config(lora=LoRAConfig(rank=2))
    config.model.path, config.model.dtype, config.model.layer_spec = str(small_model), "float32", "local"
    config.algorithm.kl_coefficient = 0.1
    _, _, [stage] = model_stages(config.model, config.parallel, 1)
    assert reference_memory(stage, config, 4).scoring == 0
    config.reference.path = "other"
    assert reference_memory(stage, config, 4).scoring == stage.count * 4
    config.reference.weights = "device"
    assert reference_memory(stage, config, 4).held == stage.count * 4
    assert (
        reference_memory(stage, replace(config, algorithm=replace(config.algorithm, kl_coefficient=0.0)), 4).held == 0
    )


def test_rates_are_those_of_the_data_sheet() -> None:
    assert Hardware().reached_host_rate == pytest.approx(44.8e9)
