"""Read converted checkpoints in a parallel layout, compare them with the models' folders, write them in that layout.

As a program under torchrun, ``sharded_weights.py JOB...`` reads FOLDER-converted and writes FOLDER-NAME for each folder
of its jobs. A job is JSON: {"name": ..., "layout": fields of ParallelConfig, "folders": [...]}.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_rlvr.megatron import parallel, sharded_checkpoint
from megatron_rlvr.megatron.bridge import PolicyBridge
from megatron_rlvr.megatron.config import ModelConfig, ParallelConfig
from megatron_rlvr.megatron.sharded_checkpoint import TrainingState
from megatron_rlvr.rollout.engines.rounded_weights import RoundedWeights
from megatron_rlvr.weights import fp8
from megatron_rlvr.weights.checkpoint_folder import fingerprint
from megatron_rlvr.weights.huggingface_folder import read_tensor, tensor_files
from tests.rendezvous import renew


def reshard(folder: Path, target: Path, here: parallel.Layout, layout: ParallelConfig) -> None:
    bridge = PolicyBridge(ModelConfig(path=str(folder), dtype="float32", layer_spec="local"), layout)
    [model] = bridge.build()
    with torch.no_grad():
        for parameter in model.parameters():  # a weight that the checkpoint lacks must not pass
            parameter.fill_(float("nan"))
    loaded = sharded_checkpoint.load(TrainingState({"model": model.sharded_state_dict()}), Path(f"{folder}-converted"))
    model.load_state_dict(loaded.described["model"])
    files = tensor_files(folder)
    rounded = RoundedWeights(bridge, [model])
    with rounded.in_place():  # each rank holds its shard of what whole tensors round to
        for name, tensor in bridge.export([model]):
            [(_, expected)] = fp8.rounded([(name, read_tensor(files[name], name))])
            assert tensor.equal(expected), (target.name, name)
    for name, tensor in bridge.export([model]):
        assert tensor.equal(read_tensor(files[name], name)), (target.name, name)
    if here.is_main:
        target.mkdir()
    dist.barrier()
    sharded_checkpoint.save(TrainingState({"model": model.sharded_state_dict()}), target)
    if here.is_main:
        (target / "run.json").write_text(json.dumps({"step": 0, "model": fingerprint(bridge.hf_config, bridge.dtype)}))


def main(jobs: list[str]) -> None:
    torch.set_num_threads(1)
    for number, text in enumerate(jobs):
        job = json.loads(text)
        renew(number)
        layout = ParallelConfig(**job["layout"])
        with parallel.parallel_groups(layout, seed=0) as here:
            for folder in job["folders"]:
                reshard(Path(folder), Path(f"{folder}-{job['name']}"), here, layout)


if __name__ == "__main__":
    main(sys.argv[1:])
