"""Updates with one fault on one rank, in several layouts: skipped by every rank, and leaving nothing behind.

``python -m torch.distributed.run ... tests/update_faults.py MODEL MIXTURE OUTPUT LAYOUT...`` with each layout a JSON
object of fields of ParallelConfig, and ``"mixture": true`` for the mixture of experts.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_rlvr.config import Config
from megatron_rlvr.control import ClipThresholds
from megatron_rlvr.data.batch import RolloutBatch
from megatron_rlvr.data.completion import Completion
from megatron_rlvr.megatron import optimizer, parallel
from megatron_rlvr.megatron.config import ModelConfig, OptimizerConfig, ParallelConfig
from megatron_rlvr.objectives import UpdateObjective, build_objective
from tests.rendezvous import renew

ADVANTAGE = torch.tensor([-0.9, 1.1, 0.7, -0.9, -0.5, 1.3, -0.5, 1.7])


def build(model: Path, layout: ParallelConfig, here: parallel.Layout, **settings: Any):
    from megatron_rlvr.training.policy import Policy

    config = Config(
        model=ModelConfig(path=str(model), dtype="float32", layer_spec="local"),
        optimizer=OptimizerConfig(learning_rate=1e-2, **settings),
        parallel=replace(layout, microbatch_sequences=4),
    )
    config.algorithm.fused_linear = layout.sequence
    return Policy(config, here)


def make_batch() -> RolloutBatch:
    generator = torch.Generator().manual_seed(1)
    responses = [torch.randint(3, 100, (n,), generator=generator).tolist() for n in (4, 1, 7, 3, 6, 2, 5, 5)]
    completions = [Completion(r, [-1.0] * len(r), "stop", 0) for r in responses]
    return RolloutBatch.from_completions([[3, 4, 5, 6], [7, 8]], completions, [0.0] * 8, padding=109)


def update(policy, advantage: torch.Tensor = ADVANTAGE, old_nan: bool = False):
    batch = make_batch()
    weight = torch.full((8,), 1 / 33 / policy.layout.data_size)
    scores = policy.score(batch, ADVANTAGE)
    if old_nan:
        scores.logprob[9] = torch.nan
    objective = UpdateObjective(build_objective("clip"), ClipThresholds())
    return policy.update(batch, torch.arange(8), advantage, weight, scores, objective)


def state(policy) -> list[torch.Tensor]:
    """Copies of everything that an update changes: weights, master weights, moments and step counts."""
    tensors = [p for chunk in policy.model_chunks for p in chunk.parameters()]
    for single in optimizer.chained_optimizers(policy.optimizer):
        tensors += [p for group in single.optimizer.param_groups for p in group["params"]]
        slots = [dict(sorted(slot.items())).values() for slot in single.optimizer.state.values()]
        tensors += [x for slot in slots for x in slot if isinstance(x, torch.Tensor)]
    return [tensor.detach().clone() for tensor in tensors]


def equal(some: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    return len(some) == len(others) and all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


def _one_weight(policy) -> torch.nn.Parameter:
    """A norm or a bias of this rank's first chunk, which every token passes."""
    return next(p for p in policy.model_chunks[0].parameters() if p.requires_grad and p.dim() == 1)


@contextmanager
def gradient_times(policy, factor: float) -> Iterator[None]:
    """Multiply the gradient of one weight of the last rank by `factor`, which only one pipeline stage then holds."""
    handle = None
    if dist.get_rank() == dist.get_world_size() - 1:
        handle = _one_weight(policy).register_hook(lambda gradient: (gradient + 1e-3) * factor)
    yield
    if handle is not None:
        handle.remove()


def with_gradient(factor: float) -> Callable:
    def fault(policy):
        with gradient_times(policy, factor):
            return update(policy)

    return fault


def nan_weight(policy):
    """One weight of rank 0 alone, which the rank holds as one copy of several."""
    weight = _one_weight(policy).data.view(-1)
    kept = weight[:1].clone()
    if dist.get_rank() == 0:
        weight[:1] = torch.nan
    try:
        return update(policy)
    finally:
        weight[:1] = kept


def advantage_of(value: float) -> Callable:
    """One completion of the last data-parallel rank has this advantage; its ranks agree, the others know nothing."""

    def fault(policy):
        is_last = policy.layout.data_rank == policy.layout.data_size - 1
        advantage = ADVANTAGE.clone()
        if is_last:
            advantage[3] = value
        return update(policy, advantage)

    return fault


FAULTS: dict[str, Callable] = {
    "advantage nan": advantage_of(torch.nan),
    "advantage inf": advantage_of(torch.inf),
    "old log-prob nan": lambda policy: update(policy, old_nan=True),
    "gradient nan": with_gradient(torch.nan),
    "gradient inf": with_gradient(torch.inf),
    "norm overflows": with_gradient(1e30),
    "weight nan": nan_weight,
}


def check(model: Path, layout: ParallelConfig, here: parallel.Layout) -> dict[str, Any]:
    """What the faults did on this rank, and whether two good updates around them equal two without."""
    policy = build(model, layout, here)
    assert update(policy).applied
    found: dict[str, Any] = {}
    before = state(policy)
    for name, fault in FAULTS.items():
        report = fault(policy)
        found[name] = [report.applied, equal(state(policy), before)]
    assert update(policy).applied
    undisturbed = build(model, layout, here)
    update(undisturbed), update(undisturbed)
    found["as if nothing had been"] = [False, equal(state(policy), state(undisturbed))]
    return found


def main(model: Path, mixture: Path, output: Path, layouts: list[str]) -> None:
    torch.set_num_threads(1)
    for number, text in enumerate(layouts):
        renew(number)
        fields = json.loads(text)
        chosen = mixture if fields.pop("mixture", False) else model
        layout = ParallelConfig(**fields)
        with parallel.parallel_groups(layout, seed=0) as here:
            (output / f"{number}-{here.rank}.json").write_text(json.dumps(check(chosen, layout, here)))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
