"""Low-rank adapters (LoRA, arXiv 2106.09685) of a model: added to its layers, found, switched off, drawn.

`lora_layers` says what an adapter computes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor
from torch.nn import Module

from megatron_rlvr.errors import UserError
from megatron_rlvr.megatron.config import ALL_LINEAR, LoRAConfig
from megatron_rlvr.megatron.families import Family
from megatron_rlvr.megatron.lora_layers import Adapter, ExpertAdapters, LayerAdapters, can_have_adapter
from megatron_rlvr.megatron.model import PolicyModel
from megatron_rlvr.megatron.weight_shards import Shard, shards


def add_adapters(model: PolicyModel, family: Family, hf_config: Any, lora: LoRAConfig) -> None:
    """Freeze the weights of a model chunk and add adapters to it, which `initialize` gives values.

    Raises:
        UserError: if ``lora.target_modules`` names a module that the family does not have, or that cannot have one.
    """
    chosen = chosen_modules(family, lora)
    model.requires_grad_(False)
    expert_rank = parallel_state.get_expert_model_parallel_rank()
    for shard in list(shards([model])):
        entry, names = family.table.find(shard.name_on(expert_rank))
        module_names = [name.removesuffix(".weight") for name in names]
        if not can_have_adapter(entry) or not any(name.rpartition(".")[2] in chosen for name in module_names):
            continue
        adapters = LayerAdapters(shard, entry, module_names, chosen, lora, model.config, hf_config)
        if isinstance(getattr(shard.owner, "weight", None), Tensor):
            _attach(shard.owner, adapters)
        elif isinstance(experts := getattr(shard.owner, "adapters", None), ExpertAdapters):
            experts.append(adapters)
        else:
            _attach(shard.owner, ExpertAdapters([adapters]))
    if not any(True for _ in adapters_in([model])):
        raise UserError(
            f"lora.target_modules={lora.target_modules}: the layers of this model have none of these modules"
        )
    model.adapted = True


def _attach(layer: Module, adapters: Module) -> None:
    layer.add_module("adapters", adapters)
    layer.register_forward_hook(_with_adapters)


def _with_adapters(layer: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor | None]) -> Any:
    """Forward hook of an adapted layer, which returns its output and a bias that is added later."""
    product, bias = output
    if not next(layer_adapters(layer)).enabled:
        return output
    return product + layer.adapters(*inputs), bias


def chosen_modules(family: Family, lora: LoRAConfig) -> list[str]:
    """Return the last parts of the names of the modules that get an adapter.

    Raises:
        UserError: see `add_adapters`.
    """
    possible = list(
        dict.fromkeys(
            name.removesuffix(".weight").rpartition(".")[2]
            for entry in family.weights
            if can_have_adapter(entry)
            for name in entry.names
        )
    )
    if lora.target_modules == [ALL_LINEAR]:
        return possible
    for name in lora.target_modules:
        if name not in possible:
            raise UserError(
                f"lora.target_modules: {name} is not a linear layer of this model: choose from {', '.join(possible)}"
            )
    return [name for name in possible if name in lora.target_modules]


def layer_adapters(module: Module) -> Iterator[LayerAdapters]:
    """Yield the adapters within a module, layer by layer."""
    for child in module.modules():
        if isinstance(child, LayerAdapters):
            yield child


def adapters_of(shard: Shard) -> list[Adapter | None]:
    """Return the adapters of the Hugging Face tensors that a weight consists of; [] if it has none."""
    adapters = getattr(shard.owner, "adapters", None) if shard.name.endswith(".weight") else None  # not for a bias
    if isinstance(adapters, ExpertAdapters):
        assert shard.expert is not None
        return adapters[shard.expert].parts  # type: ignore[return-value]
    return adapters.parts if isinstance(adapters, LayerAdapters) else []


def adapters_in(model_chunks: Sequence[Module]) -> Iterator[Adapter]:
    """Yield all adapters of this rank."""
    for chunk in model_chunks:
        yield from (module for module in chunk.modules() if isinstance(module, Adapter))


@contextmanager
def without_adapters(model_chunks: Sequence[Module]) -> Iterator[None]:
    """Compute with the frozen weights alone: the policy that training started from."""
    layers = [adapters for chunk in model_chunks for adapters in layer_adapters(chunk)]
    for adapters in layers:
        adapters.enabled = False
    try:
        yield
    finally:
        for adapters in layers:
            adapters.enabled = True


@torch.no_grad()
def initialize(model_chunks: Sequence[Module], seed: int) -> None:
    """Draw every A from U(-1, 1) / sqrt(inputs), as PEFT does, and set every B to zero.

    The values depend on the seed and on the name of the module, not on the parallel layout.
    """
    for adapter in adapters_in(model_chunks):
        digest = hashlib.sha256(f"{seed} {adapter.module_name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
        rank, inputs = adapter.lora_A.shape
        ranks = adapter.group.size() if adapter.split["lora_A"] is not None else 1
        whole = (2 * torch.rand(rank, inputs * ranks, generator=generator) - 1) / (inputs * ranks) ** 0.5
        adapter.lora_A.copy_(whole.chunk(ranks, dim=1)[adapter.group.rank() if ranks > 1 else 0])
        adapter.lora_B.zero_()
