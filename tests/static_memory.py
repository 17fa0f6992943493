"""Bytes that a real policy holds after an optimizer step, and the most that it holds during one, to test the plan.

As a program under torchrun, ``static_memory.py FOLDER OUTPUT LAYOUT...`` writes OUTPUT/<layout number>-<rank>.json. A
layout is JSON: {"dtype": ..., perhaps "lora_rank", and fields of ParallelConfig}.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import sys
import weakref
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_rlvr.config import Config
from megatron_rlvr.control import AffineThreshold, ClipThresholds
from megatron_rlvr.data.batch import RolloutBatch
from megatron_rlvr.data.completion import Completion
from megatron_rlvr.megatron import parallel
from megatron_rlvr.megatron.config import ParallelConfig
from megatron_rlvr.objectives import UpdateObjective, build_objective
from tests.families import ADVANTAGE, VOCABULARY, WEIGHT, policy_config
from tests.rendezvous import renew

PROMPT, RESPONSE = 48, 32


def live_storages() -> dict[int, torch.UntypedStorage]:
    """Every storage that a tensor of this process refers to, by the storage's identity."""
    while gc.collect():  # what one collection frees may have held the next cycle
        pass
    tensors = [x for x in gc.get_objects() if isinstance(x, torch.Tensor) and x.device.type == "cpu"]
    return {x.untyped_storage()._cdata: x.untyped_storage() for x in tensors}


def live_bytes() -> int:
    return sum(storage.nbytes() for storage in live_storages().values())


class HighWater(TorchDispatchMode):
    """The most bytes that the storages created inside it held at one time, backward passes included."""

    def __enter__(self) -> HighWater:
        self.before = set()
        for key, storage in live_storages().items():
            self.before.add(key)
            weakref.finalize(storage, self.before.discard, key)  # a new storage may get the identity of a freed one
        self.living: dict[int, int] = {}
        self.current = self.peak = 0
        super().__enter__()
        return self

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor) and value.device.type == "cpu":
                self._watch(value.untyped_storage())
        return result

    def _watch(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self.living or key in self.before:
            return
        self.living[key] = storage.nbytes()
        self.current += storage.nbytes()
        self.peak = max(self.peak, self.current)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.current -= self.living.pop(key)


def layout_config(folder: Path, settings: dict[str, Any]) -> Config:
    """The configuration of a layout, from its dtype and fields of ParallelConfig."""
    fields = dict(settings)
    config = policy_config(folder, ParallelConfig())
    config.model.dtype, config.algorithm.fused_linear = fields.pop("dtype"), fields.pop("fused", False)
    config.lora.rank = fields.pop("lora_rank", 0)
    config.parallel = ParallelConfig(**{"microbatch_sequences": 8, **fields})
    config.data.max_prompt_tokens, config.rollout.max_tokens = PROMPT, RESPONSE
    # Every rank of the measurement has the whole batch, so the plan must assume that many prompts per rank.
    parallel = config.parallel
    ranks = 2 // (parallel.tensor * parallel.pipeline * parallel.context)
    config.rollout.prompts_per_step, config.rollout.samples_per_prompt = 2 * ranks, 4
    config.algorithm.minibatches = 1
    return config


def longest_batch() -> RolloutBatch:
    """Eight sequences of the greatest length that the configuration allows, as the plan assumes."""
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(0, VOCABULARY, (2, PROMPT), generator=generator).tolist()
    responses = torch.randint(0, VOCABULARY, (8, RESPONSE), generator=generator).tolist()
    completions = [Completion(r, [-1.0] * len(r), "length", 0) for r in responses]
    return RolloutBatch.from_completions(prompts, completions, [0.0] * 8, padding=0)


def held_and_peak(config: Config, here: parallel.Layout) -> tuple[int, int]:
    """Bytes that a policy adds to the process after one update, and the most that it adds during the next."""
    from megatron_rlvr.training.policy import Policy

    batch = longest_batch()
    before = live_bytes()
    policy = Policy(config, here)
    # megatron-core keeps tensors of the last microbatch, which the static memory excludes: make it small.
    microbatching = policy.microbatching
    policy.microbatching = dataclasses.replace(microbatching, sequences=1, tokens=0)
    scores = policy.score(batch, ADVANTAGE)
    wide = AffineThreshold(0.2, 0.0)
    objective = UpdateObjective(build_objective("clip"), ClipThresholds(wide, wide))

    def update() -> None:
        policy.update(batch, torch.arange(8), ADVANTAGE, WEIGHT, scores, objective)

    update()
    policy.microbatching = microbatching
    held = live_bytes() - before
    with HighWater() as water:
        update()
    return held, held + water.peak


def main(folder: Path, output: Path, layouts: list[str]) -> None:
    from megatron.core import parallel_state

    torch.set_num_threads(1)
    for number, text in enumerate(layouts):
        renew(number)
        config = layout_config(folder, json.loads(text))
        with parallel.parallel_groups(config.parallel, seed=0) as here:
            held, peak = held_and_peak(config, here)
            found = {"stage": parallel_state.get_pipeline_model_parallel_rank(), "bytes": held, "peak": peak}
            (output / f"{number}-{here.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
