"""The TransformerConfig of every example configuration under Transformer Engine, made without it, and its guards.

``python tests/unit/megatron/test_fusions.py`` writes the snapshot anew; look at its difference before you commit it.
"""

from __future__ import annotations

import dataclasses
import json
import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_rlvr.config import load_config, resolve
from megatron_rlvr.errors import UserError
from megatron_rlvr.megatron import fusions, layer_spec
from megatron_rlvr.megatron.bridge import PolicyBridge
from megatron_rlvr.megatron.config import ParallelConfig
from megatron_rlvr.megatron.fusions import check_fusions, fusion_settings, output_layer_is_fused
from megatron_rlvr.megatron.parallel import parallel_groups
from megatron_rlvr.megatron.stage_shapes import fake_rank
from tests.families import make_family
from tests.processes import ROOT

EXAMPLES = sorted((ROOT / "examples" / "configs").glob("*.yaml"))
SNAPSHOT = Path(__file__).with_name("transformer_configs.json")


@contextmanager
def transformer_engine_pretended() -> Iterator[None]:
    """Let megatron-core believe that the functions of Transformer Engine which it imports exist."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer_spec, "check_installed", lambda _name: None)
        for module, functions in fusions._NEEDED.values():
            for function in functions:
                patch.setattr(module, function, lambda *_: None, raising=False)
        yield


def differences(config: TransformerConfig) -> dict[str, Any]:
    """The fields of a TransformerConfig that do not have their default, as JSON has them."""
    found = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        default = field.default_factory() if callable(field.default_factory) else field.default
        if value == default or (callable(value) and field.name != "activation_func"):
            continue
        simple = isinstance(value, (bool, int, float, str, list, type(None)))
        found[field.name] = value if simple else getattr(value, "__name__", str(value))
    return found


def snapshot(example: Path) -> dict[str, Any]:
    """The settings of an example configuration on 128 GPUs, or on as many as its layout divides."""
    with tempfile.TemporaryDirectory() as folder, transformer_engine_pretended():
        architecture = example.parent / "architectures" / f"{example.stem}.json"
        (Path(folder) / "config.json").write_text(architecture.read_text())
        config = resolve(load_config(example, [f"model.path={folder}"]), on_gpu=True)
        parallel = config.parallel
        with fake_rank(parallel, 0, math.lcm(128, parallel.pipeline * max(parallel.tensor, parallel.expert))):
            return differences(PolicyBridge(config.model, config.parallel).config)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_settings_of_the_examples_under_transformer_engine(example: Path) -> None:
    assert snapshot(example) == json.loads(SNAPSHOT.read_text())[example.stem]


def test_snapshot_covers_every_example_and_fusion() -> None:
    recorded = json.loads(SNAPSHOT.read_text())
    assert set(recorded) == {example.stem for example in EXAMPLES}
    for settings in recorded.values():
        assert settings["bias_activation_fusion"]
        assert settings.get("apply_rope_fusion", False) is ("q_lora_rank" not in settings)  # of latent attention
        assert settings["gradient_accumulation_fusion"] and "use_te_activation_func" not in settings
        mixture = "num_moe_experts" in settings
        assert mixture is settings.get("moe_permute_fusion", False) is settings.get("moe_router_fusion", False)


def test_the_router_is_not_fused_with_a_load_balancing_loss() -> None:
    assert not fusion_settings(mixture=True, router_aux_loss=0.01)["moe_router_fusion"]
    assert "moe_router_fusion" not in fusion_settings(mixture=False, router_aux_loss=0.0)


@pytest.mark.parametrize("mixture", [False, True])
def test_an_old_transformer_engine_is_refused_in_one_line(mixture: bool) -> None:
    """Nothing is pretended here, so every fused function is missing, as in an old or a broken installation."""
    with pytest.raises(UserError, match=r"lacks what megatron-core calls fused_apply_rotary_pos_emb.*>=2\.9,<2\.12"):
        check_fusions(fusion_settings(mixture, 0.0))
    with transformer_engine_pretended():
        check_fusions(fusion_settings(mixture, 0.0))
        settings = fusion_settings(True, 0.0) | {"apply_rope_fusion": False}
    with pytest.raises(UserError, match="fused_permute, "):
        check_fusions(settings)


def test_swiglu_needs_triton_and_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fusions.device, "on_gpu", lambda: True)
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CC", raising=False)
    settings = {"bias_activation_fusion": True}
    monkeypatch.setattr(fusions, "find_spec", lambda _name: None)
    with pytest.raises(UserError, match="triton, which is not installed"):
        check_fusions(settings)
    monkeypatch.setattr(fusions, "find_spec", lambda name: name)
    with pytest.raises(UserError, match="needs a C compiler on every node"):
        check_fusions(settings)
    monkeypatch.setenv("CC", "/opt/gcc/bin/gcc")
    check_fusions(settings)


def test_the_output_layer_is_built_and_computed_without_apex(tmp_path: Path) -> None:
    """megatron-core refuses to build it under gradient_accumulation_fusion; here it is built, and not fused."""
    assert not output_layer_is_fused()
    folder = make_family(tmp_path, "llama-untied")
    config = load_config(EXAMPLES[0], [f"model.path={folder}", "model.dtype=float32", "model.layer_spec=local"])
    with parallel_groups(ParallelConfig(), seed=0):
        bridge = PolicyBridge(config.model, ParallelConfig())
        bridge.config.gradient_accumulation_fusion = True
        [model] = bridge.build()
        assert not output_layer_is_fused()  # the check is lifted only while the model is built
        hidden = torch.randn(3, bridge.config.hidden_size, requires_grad=True)
        model.project(hidden).sum().backward()  # would call Apex if it were fused
        assert model.output_layer.weight.grad is not None and hidden.grad is not None


if __name__ == "__main__":
    records = {example.stem: snapshot(example) for example in EXAMPLES}
    SNAPSHOT.write_text(json.dumps(records, indent=1, sort_keys=True) + "\n")
