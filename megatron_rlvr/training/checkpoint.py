"""Checkpoints of a run: written beside, renamed into place, found again whole.

``checkpoints/step_N/`` holds megatron-core's sharded weights and optimizer state (torch_dist, so another parallel
layout can load it) and ``run.json`` with the schedule's state and what the checkpoint is of. The folder gets its name
only when every file is complete, so a name without ``.partial`` is a whole checkpoint; ``latest`` names the newest.
"""

from __future__ import annotations

import copy
import json
import math
import re
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.strategies import torch as torch_dist
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint import save as save_torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner

from megatron_rlvr.atomic_write import write_text
from megatron_rlvr.errors import UserError
from megatron_rlvr.megatron import collectives, optimizer_state
from megatron_rlvr.megatron.bridge import PolicyBridge
from megatron_rlvr.training.config import CheckpointConfig
from megatron_rlvr.training.policy import Policy

_NAME = re.compile(r"step_(\d+)")


class DiskWriter(FileSystemWriter):
    """torch's writer of checkpoint files that says what the disk said.

    torch.save turns the disk's "No space left on device" into an error about positions in its archive.
    """

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Any:
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            under: BaseException | None = error
            while under is not None and not isinstance(under, OSError):
                under = under.__cause__ or under.__context__
            raise under or error from None


class DirectSave(torch_dist.TorchDistSaveShardedStrategy):
    """megatron-core's torch_dist format written by this process.

    Its own writer starts a manager and a child process for every save, seconds in which nothing is written; the files
    are the same.

    Args:
        group: of the exchange that a save begins and ends with; None is the whole job's default one.
        background: run by this instead of at once, on copies of the tensors; `writing` is then the result to come.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, background: ThreadPoolExecutor | None = None):
        super().__init__("torch_dist", 1, thread_count=1)
        self.group, self.background = group, background
        self.writing: Future | None = None

    def save(self, sharded_state_dict: dict, checkpoint_dir: str | Path) -> None:
        flat, _, _ = torch_dist._replace_state_dict_keys_with_sharded_keys(
            sharded_state_dict, self.keep_only_main_replica
        )
        if self.background is not None:
            for parts in flat.values():
                for part in parts:
                    tensor = torch.is_tensor(part.data)
                    part.data = part.data.detach().to("cpu", copy=True) if tensor else copy.deepcopy(part.data)
        arguments = {
            "storage_writer": DiskWriter(checkpoint_dir, thread_count=self.thread_count, sync_files=True),
            "planner": torch_dist.MCoreSavePlanner(
                dedup_replicated_tensors=not self.keep_only_main_replica, flatten_state_dict=False
            ),
            "process_group": self.group,
        }
        state = torch_dist.mcore_to_pyt_state_dict(flat, False)
        if self.background is None:
            save_torch(state, **arguments)
        else:
            self.writing = self.background.submit(save_torch, state, **arguments)


@dataclass
class _Pending:
    """A checkpoint on its way to the disk, and what becomes of its ``run.json``."""

    step: int
    record: dict[str, Any]
    writing: Future | None


class Checkpoints:
    """The checkpoints of one run directory. Collective: every process of the job calls every method together.

    Args:
        folder: ``checkpoints/`` of the run directory.
        config: what stays, and whether the run goes on while a checkpoint is written.

    Attributes:
        tell: hears the step of every checkpoint once it is whole.
    """

    def __init__(self, folder: Path, config: CheckpointConfig):
        self.folder, self.config = folder, config
        self.tell: Callable[[int], None] = lambda _step: None
        self._pending: _Pending | None = None
        self._group: dist.ProcessGroup | None = None
        self._background: ThreadPoolExecutor | None = None
        if config.asynchronous:
            # Its exchange must not get between the collectives of training, and has to work from a thread.
            self._group = dist.new_group(backend="gloo")
            self._background = ThreadPoolExecutor(1, "checkpoint")

    def save(self, step: int, policy: Policy, state: dict[str, Any], metrics: Mapping[str, float]) -> None:
        """Write the state after `step` steps; asynchronously, only after the one before is whole.

        Args:
            step, policy, state: what is saved.
            metrics: the latest, of which ``checkpoint.keep_best`` may name one.

        Raises:
            UserError: when the disk refuses (full, read-only): the earlier checkpoints are untouched.
        """
        self.finish()
        partial, main = self.folder / f"step_{step}.partial", policy.layout.is_main
        record = {"step": step, "model": fingerprint(policy.bridge), "saved_at": time.time(), **state}
        record["distributed_optimizer"] = optimizer_state.is_distributed(policy.optimizer)
        if best := self.config.keep_best:
            # Before its first evaluation, as when it has just been resumed, a run has no score yet.
            known = [name for name in metrics if name.startswith("evaluation/") == best.startswith("evaluation/")]
            if best in known:
                record["score"] = metrics[best]
            elif known:
                raise UserError(f"checkpoint.keep_best={best} is no metric of this run: one of {', '.join(known)}")
        strategy = DirectSave(self._group, self._background)
        error: BaseException | None = None
        try:
            if main:
                for torn in self.folder.glob("step_*.partial"):  # of a run that was killed, or that filled the disk
                    shutil.rmtree(torn, ignore_errors=True)
                partial.mkdir(parents=True)
        except OSError as refused:
            error = refused
        self._raise_if_any(error, step, main)
        try:
            dist_checkpointing.save(self._sharded_state(policy, loading=False), str(partial), sharded_strategy=strategy)
        except (OSError, CheckpointException) as refused:
            error = refused
        self._raise_if_any(error, step, main)
        self._pending = _Pending(step, record, strategy.writing)
        if strategy.writing is None:
            self.finish()

    def poll(self) -> None:
        """Give a checkpoint its name if it is written by now; raises as `save` does."""
        if self._pending is None or self._pending.writing is None:
            return
        if not collectives.any_rank(not self._pending.writing.done()):
            self.finish()

    def finish(self) -> None:
        """Wait for the checkpoint that is being written, if any, and give it its name; raises as `save` does."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        main = dist.get_rank() == 0
        target, partial = self.folder / f"step_{pending.step}", self.folder / f"step_{pending.step}.partial"
        error: BaseException | None = None
        try:
            if pending.writing is not None:
                pending.writing.result()
        except (OSError, CheckpointException) as refused:
            error = refused
        self._raise_if_any(error, pending.step, main)
        try:
            if main:
                sizes = {file.name: file.stat().st_size for file in sorted(partial.iterdir())}
                write_text(partial / "run.json", json.dumps({**pending.record, "files": sizes}, indent=1))
                shutil.rmtree(target, ignore_errors=True)
                partial.rename(target)
                write_text(self.folder / "latest", target.name)
                for old in self._superfluous():
                    shutil.rmtree(self.folder / f"step_{old}")
        except OSError as refused:
            error = refused
        self._raise_if_any(error, pending.step, main)
        self.tell(pending.step)

    def _raise_if_any(self, error: BaseException | None, step: int, main: bool) -> None:
        """Raise on every process when one could not write, and leave nothing half written."""
        if not collectives.any_rank(error is not None):
            return
        if main:
            shutil.rmtree(self.folder / f"step_{step}.partial", ignore_errors=True)
        text = "another process could not write" if error is None else _reason(error)
        raise UserError(
            f"{self.folder / f'step_{step}'} cannot be written ({text}): the earlier checkpoints are untouched; make "
            "room and start again"
        ) from error

    def _superfluous(self) -> list[int]:
        """Steps of checkpoints that neither count, nor time, nor score keep."""
        steps = self.steps()
        kept = set(steps[-self.config.keep :])
        records = {step: json.loads((self.folder / f"step_{step}" / "run.json").read_text()) for step in steps}
        if self.config.keep_hours:
            last = -math.inf
            for step in steps:
                if (saved := records[step].get("saved_at", 0.0)) - last >= 3600 * self.config.keep_hours:
                    kept.add(step)
                    last = saved
        if self.config.keep_best and (scored := [s for s in steps if "score" in records[s]]):
            kept.add(max(scored, key=lambda step: (records[step]["score"], step)))
        return [step for step in steps if step not in kept]

    def load_newest(self, policy: Policy) -> dict[str, Any] | None:
        """Load the newest whole checkpoint into `policy`; return its state, or None where there is none.

        Raises as `load` does.
        """
        steps = self.steps()
        return self.load(steps[-1], policy) if steps else None

    def load(self, step: int, policy: Policy) -> dict[str, Any]:
        """Load the whole checkpoint of `step` into `policy`; return its state.

        Raises:
            UserError: when it is of another model, has another form of optimizer state, or cannot be read.
        """
        folder = self.folder / f"step_{step}"
        record = json.loads((folder / "run.json").read_text())
        check_same_model(
            record["model"],
            fingerprint(policy.bridge),
            folder,
            remedy="set model.path to its model, or choose another run_directory",
        )
        distributed = optimizer_state.is_distributed(policy.optimizer)
        if record.get("distributed_optimizer", distributed) != distributed:
            raise UserError(
                f"{folder} was written with parallel.distributed_optimizer={str(not distributed).lower()}, whose state "
                "has another form: set it back"
            )
        try:
            loaded = dist_checkpointing.load(self._sharded_state(policy, loading=True), str(folder))
        except (OSError, CheckpointingException, CheckpointException, KeyError) as error:
            raise UserError(
                f"{folder} cannot be read ({_reason(error)}): remove it to go on from the one before"
            ) from error
        for number, part in enumerate(policy.model_chunks):
            part.load_state_dict(loaded[f"model{number}" if number else "model"])
        optimizer_state.load(policy.optimizer, loaded["optimizer"])
        return record

    def steps(self) -> list[int]:
        """Steps of the whole checkpoints, oldest first."""
        if not self.folder.is_dir():
            return []
        found = (_NAME.fullmatch(entry.name) for entry in self.folder.iterdir() if is_whole(entry))
        return sorted(int(match.group(1)) for match in found if match)

    @staticmethod
    def _sharded_state(policy: Policy, loading: bool) -> dict[str, Any]:
        # Of any number of parts, tensors are named by their place in the whole model.
        model = {
            f"model{number}" if number else "model": part.sharded_state_dict()
            for number, part in enumerate(policy.model_chunks)
        }
        return model | {"optimizer": optimizer_state.sharded_state(policy.optimizer, model, loading)}


def is_whole(folder: Path) -> bool:
    """Whether every file of a checkpoint is there, as long as it was written."""
    try:
        sizes = json.loads((folder / "run.json").read_text()).get("files", {})
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


def _reason(error: BaseException) -> str:
    """The innermost cause in one line: torch wraps what the disk said in a traceback for every rank."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip() or type(error).__name__).splitlines()[-1]


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
        "num_experts",
        "moe_intermediate_size",
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
