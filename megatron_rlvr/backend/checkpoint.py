"""Checkpoints of a run: written beside, renamed into place, found again whole.

``checkpoints/step_N/`` holds megatron-core's sharded weights and optimizer state (torch_dist, so another parallel
layout can load it) and ``run.json`` with the schedule's state and what the checkpoint is of. The folder gets its name
only when every file is complete, so a name without ``.partial`` is a whole checkpoint; ``latest`` names the newest.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import torch as torch_dist
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint import save as save_torch

from megatron_rlvr.backend import optimizer_state
from megatron_rlvr.backend.huggingface import PolicyBridge
from megatron_rlvr.backend.policy import Policy
from megatron_rlvr.errors import UserError

_NAME = re.compile(r"step_(\d+)")


class DirectSave(torch_dist.TorchDistSaveShardedStrategy):
    """megatron-core's torch_dist format written by this process.

    Its own writer starts a manager and a child process for every save, seconds in which nothing is written; the files
    are the same.
    """

    def save(self, sharded_state_dict: dict, checkpoint_dir: str | Path) -> None:
        flat, _, _ = torch_dist._replace_state_dict_keys_with_sharded_keys(
            sharded_state_dict, self.keep_only_main_replica
        )
        save_torch(
            torch_dist.mcore_to_pyt_state_dict(flat, False),
            storage_writer=FileSystemWriter(checkpoint_dir, thread_count=self.thread_count, sync_files=True),
            planner=torch_dist.MCoreSavePlanner(
                dedup_replicated_tensors=not self.keep_only_main_replica, flatten_state_dict=False
            ),
        )


@dataclass
class Checkpoints:
    """The checkpoints of one run directory. Collective: every process of the job calls every method together.

    Args:
        folder: ``checkpoints/`` of the run directory.
        keep: how many of the newest stay.
    """

    folder: Path
    keep: int

    def save(self, step: int, policy: Policy, state: dict[str, Any]) -> Path:
        """Write the state after `step` steps and drop the oldest beyond `keep`."""
        target = self.folder / f"step_{step}"
        partial = self.folder / f"step_{step}.partial"
        main = policy.layout.is_main
        if main:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        dist.barrier()
        dist_checkpointing.save(
            self._sharded_state(policy, loading=False),
            str(partial),
            sharded_strategy=DirectSave("torch_dist", 1, thread_count=1),
        )
        dist.barrier()
        if main:
            record = {"step": step, "model": fingerprint(policy.bridge), **state}
            _write_text(partial / "run.json", json.dumps(record, indent=1))
            shutil.rmtree(target, ignore_errors=True)
            partial.rename(target)
            _write_text(self.folder / "latest.partial", target.name)
            (self.folder / "latest.partial").replace(self.folder / "latest")
            for old in self.steps()[: -self.keep]:
                shutil.rmtree(self.folder / f"step_{old}")
        dist.barrier()
        return target

    def load_newest(self, policy: Policy) -> dict[str, Any] | None:
        """Load the newest whole checkpoint into `policy`; return its state, or None where there is none.

        Raises:
            UserError: when it is a checkpoint of another model.
        """
        steps = self.steps()
        if not steps:
            return None
        folder = self.folder / f"step_{steps[-1]}"
        record = json.loads((folder / "run.json").read_text())
        check_same_model(
            record["model"],
            fingerprint(policy.bridge),
            folder,
            remedy="set model.path to its model, or choose another run_directory",
        )
        loaded = dist_checkpointing.load(self._sharded_state(policy, loading=True), str(folder))
        policy.model.load_state_dict(loaded["model"])
        optimizer_state.load(policy.optimizer, loaded["optimizer"])
        return record

    def steps(self) -> list[int]:
        """Steps of the whole checkpoints, oldest first."""
        if not self.folder.is_dir():
            return []
        found = (_NAME.fullmatch(entry.name) for entry in self.folder.iterdir() if (entry / "run.json").is_file())
        return sorted(int(match.group(1)) for match in found if match)

    @staticmethod
    def _sharded_state(policy: Policy, loading: bool) -> dict[str, Any]:
        model = policy.model.sharded_state_dict()
        return {"model": model, "optimizer": optimizer_state.sharded_state(policy.optimizer, model, loading)}


def fingerprint(bridge: PolicyBridge) -> dict[str, Any]:
    """What must agree for a checkpoint to be of this model: its family and shape."""
    config = bridge.hf_config
    names = (
        "model_type",
        "num_hidden_layers",
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
        "vocab_size",
        "tie_word_embeddings",
    )
    return {name: getattr(config, name, None) for name in names} | {"dtype": str(bridge.dtype)}


def check_same_model(found: dict[str, Any], here: dict[str, Any], checkpoint: Path, remedy: str) -> None:
    """Refuse a checkpoint whose fingerprint differs.

    Raises:
        UserError: naming every difference.
    """
    different = [f"{key}={found.get(key)} instead of {here[key]}" for key in here if found.get(key) != here[key]]
    if different:
        raise UserError(f"{checkpoint} is a checkpoint of another model ({', '.join(different)}): {remedy}")


def _write_text(path: Path, text: str) -> None:
    """Write and flush to the disk, so that a name is never there before its contents."""
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
