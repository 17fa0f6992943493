"""The fp8 settings are passed to megatron-core unchanged, and refused for layers that cannot compute in fp8."""

from __future__ import annotations

from pathlib import Path

import pytest
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_rlvr.errors import UserError
from megatron_rlvr.megatron.config import ModelConfig
from megatron_rlvr.megatron.transformer_settings import fp8_settings
from megatron_rlvr.train import main


def test_megatron_core_accepts_the_settings() -> None:
    assert fp8_settings(ModelConfig(), "transformer_engine") == {}
    for recipe in ("delayed", "tensorwise"):
        settings = fp8_settings(ModelConfig(fp8="hybrid", fp8_recipe=recipe), "transformer_engine")
        config = TransformerConfig(num_layers=2, hidden_size=64, num_attention_heads=4, bf16=True, **settings)
        assert config.fp8 == "hybrid" and config.fp8_recipe == recipe


def test_local_layers_refuse_fp8() -> None:
    with pytest.raises(UserError, match=r"model\.fp8=e4m3 needs Transformer Engine's layers"):
        fp8_settings(ModelConfig(fp8="e4m3"), "local")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.fp8=hybrid", "model.fp8=hybrid needs Transformer Engine's layers"),
        ("model.fp8=e5m2", "model.fp8 must be one of none, hybrid, e4m3"),
        ("model.fp8_recipe=static", "model.fp8_recipe must be one of delayed, tensorwise"),
    ],
)
def test_a_run_refuses_wrong_fp8(
    override: str, message: str, run_yaml: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(run_yaml), override]) == 2
    line = capsys.readouterr().err
    assert message in line and line.count("\n") == 1


def test_fp8_of_float32_weights_is_refused(run_yaml: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run_yaml), "model.fp8=hybrid", "model.dtype=float32"]) == 2
    assert "needs model.dtype=bfloat16" in capsys.readouterr().err
