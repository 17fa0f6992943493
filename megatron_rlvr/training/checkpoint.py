"""The checkpoints of a run: written under a temporary name, renamed when complete, deleted by age and score.

``checkpoints/step_N/`` contains weights and optimizer state in megatron-core's torch_dist format, which other parallel
layouts can load, and ``run.json`` with the state of the schedule and of the run. The folder is named ``step_N.partial``
until every file is complete, so a name without ``.partial`` is a complete checkpoint. ``latest`` names the newest one.
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
from megatron_rlvr.megatron import optimizer_state, sharded_checkpoint, waiting
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
    """A checkpoint that is being written, and the record for its ``run.json``."""

    step: int
    record: dict[str, Any]
    writing: Future | None


class Checkpoints:
    """The checkpoints of one run directory. Collective: every process of the job calls every method together.

    Args:
        folder: ``checkpoints/`` of the run directory.
        config: which checkpoints to keep, and whether to write in the background.

    Attributes:
        on_complete: called with the step of each checkpoint when it is complete.
    """

    def __init__(self, folder: Path, config: CheckpointConfig):
        self.folder, self.config = folder, config
        self.on_complete: Callable[[int], None] = lambda _step: None
        self._pending: _Pending | None = None
        self._group: dist.ProcessGroup | None = None
        self._background: ThreadPoolExecutor | None = None
        if config.asynchronous:
            # The collectives of a background save run on another thread, so training must not use the same group.
            self._group = dist.new_group(backend="gloo")
            self._background = ThreadPoolExecutor(1, "checkpoint")

    def save(self, step: int, policy: Policy, state: dict[str, Any], metrics: Mapping[str, float]) -> None:
        """Write the state after `step` steps. This first waits for an unfinished background save.

        Args:
            step: number of completed steps.
            policy: the policy with its weights and optimizer state.
            state: state of the run, for ``run.json``.
            metrics: the latest metrics, one of which ``checkpoint.keep_best`` may name.

        Raises:
            UserError: if files cannot be written, or no metric has that name. Earlier checkpoints are unchanged.
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
                for leftover in self.folder.glob("step_*.partial"):  # from a run that was killed or filled the disk
                    shutil.rmtree(leftover, ignore_errors=True)
                partial.mkdir(parents=True)
        except OSError as failure:
            error = failure
        self._raise_if_any(error, step)
        writing: Future | None = None
        try:
            sharded = sharded_checkpoint.training_state(policy.model_chunks, policy.optimizer, loading=False)
            writing = sharded_checkpoint.save(sharded, partial, group=self._group, background=self._background)
        except sharded_checkpoint.SAVE_ERRORS as failure:
            error = failure
        self._raise_if_any(error, step)
        self._pending = _Pending(step, record, writing)
        if writing is None:
            self.finish()

    def _score(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Return the value of the metric that ``checkpoint.keep_best`` names, as an entry of ``run.json``."""
        best = self.config.keep_best
        if not best:
            return {}
        # There is no score before the first evaluation, or before the first step of a resumed run.
        known = [name for name in metrics if name.startswith("evaluation/") == best.startswith("evaluation/")]
        if known and best not in known:
            raise UserError(f"checkpoint.keep_best={best} is not a metric of this run: use one of {', '.join(known)}")
        return {"score": metrics[best]} if known else {}

    def poll(self) -> None:
        """Complete the checkpoint of a background save if it has ended on every process; raises like `save`."""
        if self._pending is None or self._pending.writing is None:
            return
        what = "the state of a checkpoint that is written in the background"
        if not waiting.any_rank(not self._pending.writing.done(), what):
            self.finish()

    def finish(self) -> None:
        """Wait for the checkpoint that is being written, if any, and complete it; raises like `save`."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        target, partial = self.folder / f"step_{pending.step}", self.folder / f"step_{pending.step}.partial"
        error: BaseException | None = None
        try:
            if pending.writing is not None:
                pending.writing.result()
        except sharded_checkpoint.SAVE_ERRORS as failure:
            error = failure
        self._raise_if_any(error, pending.step)
        try:
            if dist.get_rank() == 0:
                write_record(partial, pending.record)
                shutil.rmtree(target, ignore_errors=True)
                partial.rename(target)
                write_text(self.folder / "latest", target.name)
                for step in self._expired():
                    shutil.rmtree(self.folder / f"step_{step}")
        except OSError as failure:
            error = failure
        self._raise_if_any(error, pending.step)
        self.on_complete(pending.step)

    def _raise_if_any(self, error: BaseException | None, step: int) -> None:
        """Raise on every process and delete the partial checkpoint, if any process has an error."""
        if not waiting.any_rank(error is not None, f"checkpoint step_{step} to be written"):
            return
        if dist.get_rank() == 0:
            shutil.rmtree(self.folder / f"step_{step}.partial", ignore_errors=True)
        reason = "another process could not write" if error is None else sharded_checkpoint.root_cause(error)
        raise UserError(
            f"{self.folder / f'step_{step}'} cannot be written ({reason}): earlier checkpoints are intact; free some "
            "space and start again"
        ) from error

    def _expired(self) -> list[int]:
        """Return the steps of the checkpoints that `config` does not keep."""
        return expired({step: read_record(self.folder / f"step_{step}") for step in self.steps()}, self.config)

    def load_newest(self, policy: Policy) -> dict[str, Any] | None:
        """Load the newest complete checkpoint into `policy`; returns its record, or None if there is no checkpoint.

        Raises:
            UserError: see `load`.
        """
        steps = self.steps()
        return self.load(steps[-1], policy) if steps else None

    def load(self, step: int, policy: Policy) -> dict[str, Any]:
        """Load the complete checkpoint of `step` into `policy`; returns its record, which contains the run's state.

        Raises:
            UserError: if it belongs to another model, has optimizer state of another format, or cannot be read.
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
                "has another format: set it back"
            )
        try:
            sharded = sharded_checkpoint.training_state(policy.model_chunks, policy.optimizer, loading=True)
            loaded = sharded_checkpoint.load(sharded, folder)
        except sharded_checkpoint.LOAD_ERRORS as error:
            raise UserError(
                f"{folder} cannot be read ({sharded_checkpoint.root_cause(error)}): remove it to resume from the "
                "previous checkpoint"
            ) from error
        sharded_checkpoint.load_training_state(policy.model_chunks, policy.optimizer, loaded)
        return record

    def steps(self) -> list[int]:
        """Return the steps of the complete checkpoints, oldest first."""
        if not self.folder.is_dir():
            return []
        matches = (_NAME.fullmatch(entry.name) for entry in self.folder.iterdir() if is_complete(entry))
        return sorted(int(match.group(1)) for match in matches if match)


def expired(records: Mapping[int, Mapping[str, Any]], config: CheckpointConfig) -> list[int]:
    """Return the steps of the checkpoints to delete: neither among the newest, nor kept by time or score.

    Args:
        records: ``run.json`` of every checkpoint by step, oldest first.
        config: which checkpoints to keep.
    """
    steps = list(records)
    kept = set(steps[-config.keep :])
    if config.keep_hours:
        last_kept_at = -math.inf
        for step in steps:
            if (saved_at := records[step].get("saved_at", 0.0)) - last_kept_at >= 3600 * config.keep_hours:
                kept.add(step)
                last_kept_at = saved_at
    if config.keep_best and (scored := [step for step in steps if "score" in records[step]]):
        kept.add(max(scored, key=lambda step: (records[step]["score"], step)))
    return [step for step in steps if step not in kept]
