"""What one layer keeps for its backward pass, counted with saved-tensor hooks and compared with the plan's formulas."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.autograd.graph import saved_tensors_hooks

from megatron_rlvr.megatron.bridge import PolicyBridge
from megatron_rlvr.megatron.config import LoRAConfig, ModelConfig, ParallelConfig
from megatron_rlvr.megatron.fusions import fusion_settings
from megatron_rlvr.megatron.latent_attention import latent_rotary
from megatron_rlvr.megatron.parallel import parallel_groups
from megatron_rlvr.megatron.stage_shapes import adapted_layers, attention_sizes, model_stages
from megatron_rlvr.planning.activations import adapter_activation_bytes, layer_activation_bytes
from tests.families import make_family
from tests.processes import ROOT

TOKENS, SEQUENCES = 64, 2
WIDE = {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4}


@pytest.fixture
def groups() -> Iterator[None]:
    with parallel_groups(ParallelConfig(), seed=0):
        yield


def saved_bytes(run: Any, parameters: list[torch.Tensor]) -> int:
    """Bytes of the distinct storages that autograd saves while `run` runs, without the parameters."""
    owned = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    storages: dict[int, tuple[int, torch.Tensor]] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            storages[storage.data_ptr()] = (storage.nbytes(), tensor)  # alive, so that no address is reused
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(size for size, _ in storages.values())


def shape_of(bridge: PolicyBridge) -> Any:
    """The sizes that `layer_activation_bytes` reads; `model_stages` would replace the process groups of the test."""
    config = bridge.config
    return SimpleNamespace(
        hidden=config.hidden_size,
        **attention_sizes(config),
        heads=config.num_attention_heads,
        feed_forward=config.ffn_hidden_size,
        query_norm=config.qk_layernorm and not config.multi_latent_attention,
        post_norms=bridge.family.post_norms,
        experts=config.num_moe_experts or 0,
        chosen=config.moe_router_topk,
        expert_feed_forward=config.moe_ffn_hidden_size or 0,
        shared_feed_forward=config.moe_shared_expert_intermediate_size or 0,
    )


WIDE_LATENT = {
    **WIDE,
    "num_key_value_heads": 8,
    "num_hidden_layers": 1,
    "first_k_dense_replace": 0,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 24,
    "n_shared_experts": 2,
}
LOCAL: dict[str, dict[str, Any]] = {
    **{f"{name}-untied": {**WIDE, "head_dim": 16} for name in ("llama", "qwen2", "qwen3")},
    **{name: {**WIDE, "head_dim": 16} for name in ("gemma3", "qwen3-moe")},
    "moonlight": WIDE_LATENT,
    "deepseek-v3": {**WIDE_LATENT, "q_lora_rank": 96},
}


def kept_and_planned(folder: Path, lora: LoRAConfig) -> tuple[int, int]:
    """Bytes that a local layer keeps, and those that the plan counts."""
    model_config = ModelConfig(path=str(folder), dtype="float32", layer_spec="local")
    bridge = PolicyBridge(model_config, ParallelConfig(), lora)
    shape = shape_of(bridge)
    [model] = bridge.build()
    hidden = torch.randn(TOKENS, SEQUENCES, 128, dtype=bridge.dtype, requires_grad=True)
    rotary = model.rotary_pos_emb(TOKENS)
    if bridge.config.multi_latent_attention:
        rotary = latent_rotary(rotary, 1.0, bridge.dtype)
    layer = model.decoder.layers[0]

    def forward() -> None:
        layer(hidden, attention_mask=None, rotary_pos_emb=rotary)

    found = saved_bytes(forward, [*model.parameters(), rotary])
    tokens, mixture, rank = TOKENS * SEQUENCES, bool(shape.experts), lora.rank
    planned = layer_activation_bytes(shape, ParallelConfig(), tokens, 4, True, mixture, frozen=rank > 0)
    if rank:
        adapted = adapted_layers(layer)
        planned += adapter_activation_bytes(shape, adapted, ParallelConfig(), tokens, 4, True, rank, mixture)
    return found, planned


@pytest.mark.parametrize("rank", [0, 24])
@pytest.mark.parametrize("family", LOCAL)
@pytest.mark.usefixtures("groups")
def test_a_local_layer_keeps_what_the_plan_counts(family: str, rank: int, tmp_path: Path) -> None:
    folder = make_family(tmp_path, family, **LOCAL[family])
    found, planned = kept_and_planned(folder, LoRAConfig(rank=rank))
    assert found == pytest.approx(planned, rel=0.02), found / planned


@pytest.mark.parametrize(
    ("family", "subsets"),
    [
        ("llama-untied", [["q_proj", "v_proj"], ["o_proj"], ["up_proj"], ["down_proj", "k_proj"]]),
        ("qwen3-moe", [["q_proj", "v_proj"], ["up_proj"], ["down_proj", "o_proj"]]),
        ("deepseek-v3", [["q_a_proj", "kv_a_proj_with_mqa"], ["o_proj"], ["kv_b_proj", "down_proj"], ["gate_proj"]]),
    ],
)
@pytest.mark.usefixtures("groups")
def test_a_layer_with_adapters_on_some_modules(family: str, subsets: list[list[str]], tmp_path: Path) -> None:
    """The plan is as far off as with adapters on all modules, by the small tensors that it leaves out."""
    folder = make_family(tmp_path, family, **LOCAL[family])
    found, planned = kept_and_planned(folder, LoRAConfig(rank=24))
    for modules in subsets:
        less_found, less_planned = kept_and_planned(folder, LoRAConfig(rank=24, target_modules=modules))
        assert less_found < found and less_found - less_planned == found - planned, modules


@pytest.mark.parametrize(("fused", "kept"), [(True, 3), (False, 5)])
def test_fused_swiglu_keeps_3_f_and_unfused_5_f(fused: bool, kept: int) -> None:
    """megatron-core's feed-forward part, which all layers share, under the setting of Transformer Engine's."""
    assert fusion_settings(mixture=False, router_aux_loss=0.0)["bias_activation_fusion"]
    h, f = 32, 512
    config = TransformerConfig(
        num_layers=1,
        hidden_size=h,
        ffn_hidden_size=f,
        num_attention_heads=4,
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        bias_activation_fusion=fused,
        use_cpu_initialization=True,
    )
    weights = [torch.randn(2 * f, h, requires_grad=True), torch.randn(h, f, requires_grad=True)]

    class Linear(torch.nn.Module):
        def __init__(self, size_in: int, *_: Any, **__: Any):
            super().__init__()
            self.weight = weights[0] if size_in == h else weights[1]

        def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, None]:
            return torch.nn.functional.linear(hidden, self.weight), None

    layer = MLP(config, MLPSubmodules(linear_fc1=Linear, linear_fc2=Linear), ffn_hidden_size=f, tp_group=object())
    hidden = torch.randn(8, 2, h, requires_grad=True)
    with torch.compiler.set_stance("force_eager"):
        found = saved_bytes(lambda: layer(hidden), weights)
    assert found == 16 * 4 * (h + kept * f)


def test_layers_of_deepseek_v3_by_hand(tmp_path: Path) -> None:
    """A dense layer and a mixture with a shared expert, under tensor and sequence parallelism, for 16 tokens."""
    (tmp_path / "config.json").write_text((ROOT / "examples/configs/architectures/deepseek-v3.json").read_text())
    parallel = ParallelConfig(tensor=8, pipeline=7, last_stage_layers=7, sequence=True, expert=32)
    shape, _, _ = model_stages(ModelConfig(path=str(tmp_path), dtype="bfloat16"), parallel, 224)
    h, heads, tokens = 7168, 128 // 8, 16
    norms = 2 * (h + h) * 2 + 2 * (1536 + 512) * 2 + 4 * 4  # of 2 tokens of this rank
    attention = heads * (192 + 192 + 128 + 128) * 2 + heads * 4  # of 16 tokens
    dense = 3 * 18432 // 8 * 2
    shared = 3 * 2048 // 8 * 2
    routed = 8 * ((h + 3 * 2048) * 2 + 4 + 8)  # per token, of 2 tokens
    router = (5 * 256 + 4 * (2 * 256 + 1)) // 8

    def counted(mixture: bool) -> int:
        return layer_activation_bytes(shape, parallel, tokens, 2, local_layers=False, mixture=mixture)

    assert counted(mixture=False) == 2 * norms + tokens * (attention + dense)
    assert counted(mixture=True) == 2 * norms + tokens * (attention + shared + router) + 2 * routed


@pytest.mark.parametrize("name", ["llama3.3-70b", "qwen3-30b-a3b"])
def test_transformer_engine_layers_by_hand(name: str, tmp_path: Path) -> None:
    """The table of saved tensors in `layer_activation_bytes`, written out for one token of a published model."""
    architecture = json.loads((ROOT / "examples" / "configs" / "architectures" / f"{name}.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(architecture))
    parallel = ParallelConfig()
    shape, _, _ = model_stages(ModelConfig(path=str(tmp_path), dtype="bfloat16"), parallel, 1)
    h, head = architecture["hidden_size"], architecture["head_dim"]
    q, kv = head * architecture["num_attention_heads"], head * architecture["num_key_value_heads"]
    norms = 2 * (h + h) * 2 + 2 * 4
    attention = (q + kv + kv + q) * 2 + 4 * architecture["num_attention_heads"]
    if "num_experts" in architecture:
        e, k, f = (architecture[key] for key in ("num_experts", "num_experts_per_tok", "moe_intermediate_size"))
        query_norms = (q + kv) * 2 + 4 * (architecture["num_attention_heads"] + architecture["num_key_value_heads"])
        experts = k * ((h + 3 * f) * 2 + 4 + 8)
        expected = norms + attention + query_norms + experts + 4 * e + e + 4 * (2 * e + 1)
    else:
        expected = norms + attention + 3 * architecture["intermediate_size"] * 2
    assert layer_activation_bytes(shape, parallel, 1, 2, local_layers=False, mixture=bool(shape.experts)) == expected
