"""Bytes that a real policy holds after an optimizer step, beside what the plan computes; under torchrun.

``static_memory.py FOLDER OUTPUT LAYOUT...`` with layouts as JSON of {"dtype": ..., **ParallelConfig}; writes
OUTPUT/<layout number>-<rank>.json.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch

from megatron_rlvr.backend import device, parallel
from megatron_rlvr.config import Config, ParallelConfig
from megatron_rlvr.control import AffineThreshold, ClipThresholds
from megatron_rlvr.control.steering import NEUTRAL
from megatron_rlvr.objectives import build_objective
from tests.families import ADVANTAGE, WEIGHT, make_batch, policy_config
from tests.rendezvous import renew


def live_bytes() -> int:
    """Bytes of every storage that any tensor of this process refers to."""
    gc.collect()
    storages: dict[int, int] = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor) and thing.device.type == "cpu":
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def layout_config(folder: Path, settings: dict[str, Any]) -> Config:
    """The configuration of a layout given as its dtype and the fields of ParallelConfig."""
    config = policy_config(folder, ParallelConfig(**{k: v for k, v in settings.items() if k != "dtype"}))
    config.model.dtype = settings["dtype"]
    return config


def held(config: Config, here: parallel.Layout) -> int:
    """Bytes that a policy adds to the process, measured after one update."""
    from megatron_rlvr.backend.policy import Policy

    batch = make_batch()
    before = live_bytes()
    policy = Policy(config, here)
    scores = policy.score(batch, ADVANTAGE)
    wide = AffineThreshold(0.2, 0.0)
    thresholds, objective = ClipThresholds(wide, wide), build_objective("clip")
    policy.update(batch, torch.arange(8), ADVANTAGE, WEIGHT, scores, thresholds, NEUTRAL, objective)
    del scores
    return live_bytes() - before


def main(folder: Path, output: Path, layouts: list[str]) -> None:
    device.install()
    from megatron.core import parallel_state

    torch.set_num_threads(1)
    for number, text in enumerate(layouts):
        renew(number)
        config = layout_config(folder, json.loads(text))
        with parallel.parallel_groups(config.parallel, seed=0) as here:
            found = {"stage": parallel_state.get_pipeline_model_parallel_rank(), "bytes": held(config, here)}
            (output / f"{number}-{here.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
