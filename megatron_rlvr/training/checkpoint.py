"""The checkpoints of a run: written under a temporary name, renamed when complete, removed by age and score.

``checkpoints/step_N/`` holds weights and optimizer state in megatron-core's torch_dist format, which another parallel
layout can load, and ``run.json`` with the state of the schedule and of the run. The folder is named ``step_N.partial``
until every file is complete, so a name without ``.partial`` is a complete checkpoint. ``latest`` names the newest.
"""

from __future__ import annotations

import math
import re
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_rlvr.atomic_write import write_text
from megatron_rlvr.errors import UserError
from megatron_rlvr.megatron import collectives, optimizer_state, sharded_checkpoint
from megatron_rlvr.training.config import CheckpointConfig
from megatron_rlvr.training.policy import Policy
from megatron_rlvr.weights.checkpoint_folder import (
    check_same_model,
    fingerprint,
    is_complete,
    read_record,
    write_record,
)

_NAME = re.compile(r"step_(\d+)")


@dataclass
class _Pending:
    """A checkpoint that is being written, and what will be its ``run.json``."""

    step: int
    record: dict[str, Any]
    writing: Future | None


class Checkpoints:
    """The checkpoints of one run directory. Collective: every process of the job calls every method together.

    Args:
        folder: ``checkpoints/`` of the run directory.
        config: which checkpoints to keep, and whether to write in the background.

    Attributes:
        on_complete: called with the step of every checkpoint when it is complete.
    """

    def __init__(self, folder: Path, config: CheckpointConfig):
        self.folder, self.config = folder, config
        self.on_complete: Callable[[int], None] = lambda _step: None
        self._pending: _Pending | None = None
        self._group: dist.ProcessGroup | None = None
        self._background: ThreadPoolExecutor | None = None
        if config.asynchronous:
            # Its collectives run on the background thread, so training must not use the same group meanwhile.
            self._group = dist.new_group(backend="gloo")
            self._background = ThreadPoolExecutor(1, "checkpoint")

    def save(self, step: int, policy: Policy, state: dict[str, Any], metrics: Mapping[str, float]) -> None:
        """Write the state after `step` steps. A save in the background waits for the one before.

        Args:
            step: number of steps done.
            policy: whose weights and optimizer state are written.
            state: of the run, for ``run.json``.
            metrics: the latest values; ``checkpoint.keep_best`` may name one.

        Raises:
            UserError: if the disk refuses (full, read-only). The earlier checkpoints are untouched.
        """
        self.finish()
        record = {
            "step": step,
            "model": fingerprint(policy.bridge.hf_config, policy.bridge.dtype),
            "saved_at": time.time(),
            **state,
            "distributed_optimizer": optimizer_state.is_distributed(policy.optimizer),
            **self._score(metrics),
        }
        partial = self.folder / f"step_{step}.partial"
        error: BaseException | None = None
        try:
            if policy.layout.is_main:
                for torn in self.folder.glob("step_*.partial"):  # left by a run that was killed or filled the disk
                    shutil.rmtree(torn, ignore_errors=True)
                partial.mkdir(parents=True)
        except OSError as refused:
            error = refused
        self._raise_if_any(error, step)
        writing: Future | None = None
        try:
            sharded = sharded_checkpoint.training_state(policy.model_chunks, policy.optimizer, loading=False)
            writing = sharded_checkpoint.save(sharded, partial, group=self._group, background=self._background)
        except sharded_checkpoint.SAVE_ERRORS as refused:
            error = refused
        self._raise_if_any(error, step)
        self._pending = _Pending(step, record, writing)
        if writing is None:
            self.finish()

    def _score(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """The value of the metric that ``checkpoint.keep_best`` names, as an entry of ``run.json``."""
        best = self.config.keep_best
        if not best:
            return {}
        # There is no score before the first evaluation, nor, in a run that was just resumed, before the first step.
        known = [name for name in metrics if name.startswith("evaluation/") == best.startswith("evaluation/")]
        if known and best not in known:
            raise UserError(f"checkpoint.keep_best={best} is no metric of this run: one of {', '.join(known)}")
        return {"score": metrics[best]} if known else {}

    def poll(self) -> None:
        """If a background save has ended on every process, complete its checkpoint; raises as `save` does."""
        if self._pending is None or self._pending.writing is None:
            return
        if not collectives.any_rank(not self._pending.writing.done()):
            self.finish()

    def finish(self) -> None:
        """Wait for the checkpoint that is being written, if any, and complete it; raises as `save` does."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        target, partial = self.folder / f"step_{pending.step}", self.folder / f"step_{pending.step}.partial"
        error: BaseException | None = None
        try:
            if pending.writing is not None:
                pending.writing.result()
        except sharded_checkpoint.SAVE_ERRORS as refused:
            error = refused
        self._raise_if_any(error, pending.step)
        try:
            if dist.get_rank() == 0:
                write_record(partial, pending.record)
                shutil.rmtree(target, ignore_errors=True)
                partial.rename(target)
                write_text(self.folder / "latest", target.name)
                for step in self._expired():
                    shutil.rmtree(self.folder / f"step_{step}")
        except OSError as refused:
            error = refused
        self._raise_if_any(error, pending.step)
        self.on_complete(pending.step)

    def _raise_if_any(self, error: BaseException | None, step: int) -> None:
        """If any process has an error, raise on every one, and leave no partial checkpoint behind."""
        if not collectives.any_rank(error is not None):
            return
        if dist.get_rank() == 0:
            shutil.rmtree(self.folder / f"step_{step}.partial", ignore_errors=True)
        reason = "another process could not write" if error is None else sharded_checkpoint.root_cause(error)
        raise UserError(
            f"{self.folder / f'step_{step}'} cannot be written ({reason}): the earlier checkpoints are untouched; make "
            "room and start again"
        ) from error

    def _expired(self) -> list[int]:
        """Steps of the checkpoints that `config` does not keep."""
        return expired({step: read_record(self.folder / f"step_{step}") for step in self.steps()}, self.config)

    def load_newest(self, policy: Policy) -> dict[str, Any] | None:
        """Load the newest complete checkpoint into `policy`; return its state, or None if there is none.

        Raises as `load` does.
        """
        steps = self.steps()
        return self.load(steps[-1], policy) if steps else None

    def load(self, step: int, policy: Policy) -> dict[str, Any]:
        """Load the complete checkpoint of `step` into `policy`; return its state.

        Raises:
            UserError: if it is of another model, has another form of optimizer state, or cannot be read.
        """
        folder = self.folder / f"step_{step}"
        record = read_record(folder)
        check_same_model(
            record["model"],
            fingerprint(policy.bridge.hf_config, policy.bridge.dtype),
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
            sharded = sharded_checkpoint.training_state(policy.model_chunks, policy.optimizer, loading=True)
            loaded = sharded_checkpoint.load(sharded, folder)
        except sharded_checkpoint.LOAD_ERRORS as error:
            raise UserError(
                f"{folder} cannot be read ({sharded_checkpoint.root_cause(error)}): remove it to resume from the one "
                "before"
            ) from error
        sharded_checkpoint.load_training_state(policy.model_chunks, policy.optimizer, loaded)
        return record

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, oldest first."""
        if not self.folder.is_dir():
            return []
        matches = (_NAME.fullmatch(entry.name) for entry in self.folder.iterdir() if is_complete(entry))
        return sorted(int(match.group(1)) for match in matches if match)


def expired(records: Mapping[int, Mapping[str, Any]], config: CheckpointConfig) -> list[int]:
    """Steps of the checkpoints that are kept neither as one of the newest, nor for their time, nor for their score.

    Args:
        records: ``run.json`` of every checkpoint by step, oldest first.
        config: how many to keep.
    """
    steps = list(records)
    kept = set(steps[-config.keep :])
    if config.keep_hours:
        last = -math.inf
        for step in steps:
            if (saved := records[step].get("saved_at", 0.0)) - last >= 3600 * config.keep_hours:
                kept.add(step)
                last = saved
    if config.keep_best and (scored := [step for step in steps if "score" in records[step]]):
        kept.add(max(scored, key=lambda step: (records[step]["score"], step)))
    return [step for step in steps if step not in kept]
