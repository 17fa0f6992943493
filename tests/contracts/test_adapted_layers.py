"""Adapters on Transformer Engine's layers: what their hook receives, and how experts of one module are adapted."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.extensions.transformer_engine import (
    TEColumnParallelLinear,
    TELayerNormColumnParallelLinear,
    TENorm,
    TERowParallelLinear,
)
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from torch.nn.functional import linear

from megatron_rlvr.megatron import lora, parallel
from megatron_rlvr.megatron.bridge import PolicyBridge
from megatron_rlvr.megatron.config import LoRAConfig, ModelConfig, ParallelConfig
from megatron_rlvr.megatron.layer_spec import _separate_norms
from megatron_rlvr.megatron.weight_export import adapter_sources, weight_sources
from tests.contracts.megatron_calls import source
from tests.contracts.records import read_record
from tests.families import make_family


def methods(name: str) -> dict[str, ast.FunctionDef]:
    """The methods of a class of megatron-core's file of Transformer Engine layers."""
    found = next(node for node in ast.walk(source("extensions/transformer_engine.py")) if _is_class(node, name))
    return {node.name: node for node in found.body if isinstance(node, ast.FunctionDef)}  # type: ignore[attr-defined]


def _is_class(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.ClassDef) and node.name == name


@pytest.mark.parametrize(
    ("name", "arguments"), [("TELinear", ["self", "x"]), ("TEGroupedLinear", ["self", "x", "m_splits"])]
)
def test_the_hook_receives_the_input_and_returns_product_and_bias(name: str, arguments: list[str]) -> None:
    forward = methods(name)["forward"]
    assert [argument.arg for argument in forward.args.args] == arguments
    returned = [ast.unparse(node.value) for node in ast.walk(forward) if isinstance(node, ast.Return) and node.value]
    assert sorted(returned) == ["(out, None)", "out"]  # the latter if Transformer Engine returns a pair itself
    parents = {"TELinear": ("TEColumnParallelLinear", "TERowParallelLinear")}
    for child in parents.get(name, ()):
        assert "forward" not in methods(child) or "super().forward" in ast.unparse(methods(child)["forward"])


def test_grouped_layers_take_the_tokens_of_every_expert() -> None:
    record = read_record("transformer_engine")
    assert record["transformer_engine.pytorch.GroupedLinear"]["methods"]["forward"][:3] == ["self", "inp", "m_splits"]


def spec(**submodules: Any) -> SimpleNamespace:
    return SimpleNamespace(**submodules)


def test_norms_are_modules_of_their_own() -> None:
    """The layer specs of megatron-core for Transformer Engine, dense with plain and with latent attention."""
    fused = TELayerNormColumnParallelLinear
    attention = spec(linear_qkv=fused, linear_proj=TERowParallelLinear, q_layernorm=None)
    mlp = spec(linear_fc1=fused, linear_fc2=TERowParallelLinear)
    layer = spec(input_layernorm=IdentityOp, pre_mlp_layernorm=IdentityOp)
    layer.self_attention, layer.mlp = spec(submodules=attention), spec(submodules=mlp)
    _separate_norms(ModuleSpec(module=object, submodules=layer))
    assert (layer.input_layernorm, layer.pre_mlp_layernorm) == (TENorm, TENorm)
    assert (attention.linear_qkv, mlp.linear_fc1) == (TEColumnParallelLinear, TEColumnParallelLinear)
    assert (attention.linear_proj, attention.q_layernorm) == (TERowParallelLinear, None)

    attention = spec(linear_q_up_proj=fused, linear_kv_up_proj=fused, q_layernorm=IdentityOp, kv_layernorm=IdentityOp)
    mixture = spec(experts=None)  # its router reads the norm, which is a module of its own already
    layer = spec(input_layernorm=TENorm, pre_mlp_layernorm=TENorm)
    layer.self_attention, layer.mlp = spec(submodules=attention), spec(submodules=mixture)
    _separate_norms(ModuleSpec(module=object, submodules=layer))
    assert (attention.q_layernorm, attention.kv_layernorm) == (TENorm, TENorm)
    assert (attention.linear_q_up_proj, attention.linear_kv_up_proj) == (TEColumnParallelLinear,) * 2


class GroupedLinear(torch.nn.Module):
    """Computes all experts in one module, with the parameter names of Transformer Engine's GroupedLinear."""

    def __init__(self, experts: list[torch.nn.Module]):
        super().__init__()
        for number, expert in enumerate(experts):
            self.register_parameter(f"weight{number}", expert.weight)  # type: ignore[arg-type]

    def forward(self, x: torch.Tensor, m_splits: list[int]) -> tuple[torch.Tensor, None]:
        parts = [linear(part, getattr(self, f"weight{i}")) for i, part in enumerate(x.split(m_splits))]
        return torch.cat(parts), None


@pytest.fixture
def groups() -> Iterator[None]:
    with parallel.parallel_groups(ParallelConfig(), seed=0):
        yield


@pytest.mark.usefixtures("groups")
def test_experts_in_one_module_have_the_adapters_of_experts_in_many(tmp_path: Path) -> None:
    model_config = ModelConfig(path=str(make_family(tmp_path, "qwen3-moe")), dtype="float32", layer_spec="local")
    settings = LoRAConfig(rank=2)
    bridge = PolicyBridge(model_config, ParallelConfig(), settings)
    [local], [grouped] = bridge.build(), PolicyBridge(model_config, ParallelConfig()).build()
    for layer in grouped.decoder.layers:
        experts, joint = layer.mlp.experts.local_experts, torch.nn.Module()
        joint.linear_fc1 = GroupedLinear([expert.linear_fc1 for expert in experts])
        joint.linear_fc2 = GroupedLinear([expert.linear_fc2 for expert in experts])
        layer.mlp.experts = joint
    lora.add_adapters(grouped, bridge.family, bridge.hf_config, settings)
    for chunk in (local, grouped):
        lora.initialize([chunk], seed=1)
        for adapter in lora.adapters_in([chunk]):
            generator = torch.Generator().manual_seed(len(adapter.module_name) + int(adapter.lora_A.sum() * 1e6))
            adapter.lora_B.data = torch.randn(adapter.lora_B.shape, generator=generator)
    ours, theirs = (
        {source.names[0][0]: source.shard.weight for source in adapter_sources([chunk], bridge.family)}
        for chunk in (local, grouped)
    )
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    splits = [3, 0, 4, 1]
    hidden = torch.randn(8, bridge.config.hidden_size)
    experts = local.decoder.layers[1].mlp.experts.local_experts
    joint = grouped.decoder.layers[1].mlp.experts
    for number, expert in enumerate(experts):
        for layer in ("linear_fc1", "linear_fc2"):
            getattr(expert, layer).weight.data = getattr(getattr(joint, layer), f"weight{number}").data
    expected = torch.cat([e.linear_fc1(part)[0] for e, part in zip(experts, hidden.split(splits), strict=True)])
    found, bias = joint.linear_fc1(hidden, splits)
    assert bias is None and torch.allclose(found, expected, atol=1e-5)
    with lora.without_adapters([grouped]):
        assert not torch.allclose(joint.linear_fc1(hidden, splits)[0], found, atol=1e-2)
    merged = {
        name: part
        for source in weight_sources([grouped], bridge.family, bridge.hf_config)
        for name, part in zip(source.names[0], source.parts(bridge.hf_config), strict=True)
    }
    gate = torch.cat([merged[f"model.layers.1.mlp.experts.0.{name}_proj.weight"] for name in ("gate", "up")])
    assert torch.allclose(linear(hidden[:3], gate), found[:3], atol=1e-5)
