"""The bridge refuses models that it would not compute correctly, and builds models without memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_rlvr.errors import UserError
from megatron_rlvr.megatron import parallel
from megatron_rlvr.megatron.bridge import PolicyBridge
from megatron_rlvr.megatron.config import ModelConfig, ParallelConfig
from megatron_rlvr.megatron.huggingface_config import read_config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gemma3"}, "model_type 'gemma3' is not supported (the nearest is gemma3_text)"),
        (
            {"model_type": "llama", "attention_bias": True},
            "attention_bias=True is not supported: use a model with False",
        ),
        ({"model_type": "llama", "mlp_bias": True}, "mlp_bias=True"),
        (
            {"rope_scaling": {"rope_type": "longrope", "factor": 4.0, "short_factor": [1.0], "long_factor": [1.0]}},
            "rope_type='longrope' is not supported: use a model with 'default' or",
        ),
        ({"use_sliding_window": True}, "use_sliding_window=True"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
    ],
)
def test_unsupported_models(changes: dict[str, Any], message: str, small_model: Path, tmp_path: Path) -> None:
    config = json.loads((small_model / "config.json").read_text())
    config.pop("layer_types", None)
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(UserError) as refusal:
        read_config(tmp_path)
    assert message in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_model_of_shapes_takes_no_memory_on_a_gpu(small_model: Path) -> None:
    """On a GPU, megatron-core requests the GPU for every weight, which would override the meta device."""
    with parallel.parallel_groups(ParallelConfig(), seed=0):
        bridge = PolicyBridge(ModelConfig(str(small_model), "float32", "local"), ParallelConfig())
        bridge.config.use_cpu_initialization = False
        [model] = bridge.build(shapes_only=True)
        allocated = [name for name, p in model.named_parameters() if not p.is_meta and "norm" not in name]
        assert not allocated and bridge.config.use_cpu_initialization is False
