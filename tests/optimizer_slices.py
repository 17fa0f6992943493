"""Checkpoints of the distributed optimizer in several layouts: saved, resumed, loaded elsewhere and saved again.

``python -m torch.distributed.run ... tests/optimizer_slices.py MODEL MIXTURE OUTPUT CASE...`` with each case a JSON
object: ``name``, ``layout`` (fields of ParallelConfig), ``dtype``, ``mixture``, ``source`` (a case whose checkpoint it
loads and saves again) and ``earlier`` (write the format of earlier versions). Every rank writes what it found to
OUTPUT/NAME-RANK.json.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_rlvr.config import Config
from megatron_rlvr.megatron import parallel, sharded_checkpoint
from megatron_rlvr.megatron.config import ModelConfig, OptimizerConfig, ParallelConfig
from megatron_rlvr.megatron.optimizer import chained_optimizers
from tests.rendezvous import renew
from tests.update_faults import equal, state, update


class ExchangedTensors(TorchDispatchMode):
    """Counts the elements of floating-point tensors that this process passes to collectives."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "c10d":
            tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
            self.elements += sum(tensor.numel() for tensor in tensors if tensor.is_floating_point())
        return function(*args, **(kwargs or {}))


def build(model: Path, case: dict[str, Any], here: parallel.Layout):
    from megatron_rlvr.training.policy import Policy

    layout = ParallelConfig(distributed_optimizer=True, **case["layout"])
    config = Config(
        model=ModelConfig(path=str(model), dtype=case["dtype"], layer_spec="local"),
        optimizer=OptimizerConfig(learning_rate=1e-2),
        parallel=replace(layout, microbatch_sequences=4),
    )
    config.algorithm.fused_linear = layout.sequence
    return Policy(config, here)


@contextmanager
def earlier_format() -> Iterator[None]:
    """Describe the optimizer as earlier versions did: megatron-core gathers it on one rank per data-parallel group."""

    def describe(model_chunks: Any, optimizer: Any, *, loading: bool) -> sharded_checkpoint.TrainingState:
        model = {
            sharded_checkpoint._chunk_key(number): chunk.sharded_state_dict()
            for number, chunk in enumerate(model_chunks)
        }
        metadata = {
            "distrib_optim_sharding_type": "fully_reshardable",
            "distrib_optim_fully_reshardable_mem_efficient": True,
            "chained_optim_avoid_prefix": True,
        }
        for single in chained_optimizers(optimizer):
            single.data_parallel_group_gloo = single.data_parallel_group
        described = optimizer.sharded_state_dict(model, is_loading=loading, metadata=metadata)
        return sharded_checkpoint.TrainingState(model | {"optimizer": described})

    with mock.patch.object(sharded_checkpoint, "training_state", describe):
        yield


def check(model: Path, case: dict[str, Any], here: parallel.Layout, output: Path) -> dict[str, Any]:
    from megatron_rlvr.training.checkpoint import Checkpoints
    from megatron_rlvr.training.config import CheckpointConfig

    def checkpoints(name: str) -> Checkpoints:
        return Checkpoints(output / name, CheckpointConfig())

    policy, resumed = (build(model, case, here) for _ in range(2))
    assert update(policy).applied and update(policy).applied
    exchanged = ExchangedTensors()
    with exchanged, earlier_format() if case.get("earlier") else mock.MagicMock():
        checkpoints(case["name"]).save(2, policy, {}, {})
    found: dict[str, Any] = {"exchanged to save": exchanged.elements}

    loaded = []
    load = sharded_checkpoint.load
    with (
        mock.patch.object(sharded_checkpoint, "load", lambda *a: loaded.append(load(*a)) or loaded[-1]),
        ExchangedTensors() as exchanged,
    ):
        checkpoints(case["name"]).load(2, resumed)
    found["exchanged to load"] = exchanged.elements
    found["loaded elements"] = sum(t.numel() for slots in loaded[0].slots for slot in slots for t in slot.values())
    found["parameters"] = sum(p.numel() for chunk in policy.model_chunks for p in chunk.parameters())
    found["same state"] = equal(state(resumed), state(policy))
    assert update(policy).applied and update(resumed).applied
    found["same state an update later"] = equal(state(resumed), state(policy))

    if case.get("source"):
        other = build(model, case, here)
        checkpoints(case["source"]).load(2, other)
        checkpoints(f"{case['name']}-again").save(2, other, {}, {})
        assert update(other).applied
    return found


def main(model: Path, mixture: Path, output: Path, cases: list[str]) -> None:
    torch.set_num_threads(1)
    for number, case in enumerate(map(json.loads, cases)):
        renew(number)
        with parallel.parallel_groups(ParallelConfig(distributed_optimizer=True, **case["layout"]), seed=0) as here:
            found = check(mixture if case.get("mixture") else model, case, here, output)
            (output / f"{case['name']}-{here.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
