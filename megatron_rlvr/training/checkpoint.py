"""The checkpoints of a run: written and loaded by all processes together, verified before they are loaded.

``checkpoints/step_N/`` contains weights and optimizer state in megatron-core's torch_dist format, which other parallel
layouts can load, ``run.json`` with the state of the schedule and of the run, and the checksums of all files. Of a
policy with adapters, it contains these instead of all weights. A checkpoint that is damaged is never loaded: the one
before it is.
"""

from __future__ import annotations

import math
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_rlvr.checksums import DamagedError
from megatron_rlvr.errors import UserError
from megatron_rlvr.megatron import optimizer_state, sharded_checkpoint, waiting
from megatron_rlvr.training.checkpoint_loading import load_checkpoint
from megatron_rlvr.training.checkpoints_folder import faults, place, remove_leftovers, steps
from megatron_rlvr.training.config import CheckpointConfig
from megatron_rlvr.training.policy import Policy, check_finite_weights
from megatron_rlvr.weights.adapter_record import RECORD
from megatron_rlvr.weights.checkpoint_folder import fingerprint, write_record


@dataclass
class _Pending:
    """A checkpoint that is being written, the record for its ``run.json``, and whether older ones then expire."""

    step: int
    record: dict[str, Any]
    writing: Future[dict[str, str]]
    expire: bool


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
        self._held: int | None = None  # step of the checkpoint that holds the present state
        self._damaged: dict[int, str] = {}
        self._group: dist.ProcessGroup | None = None
        self._background: ThreadPoolExecutor | None = None
        if config.asynchronous:
            # The collectives of a background save run on another thread, so training must not use the same group.
            self._group = dist.new_group(backend="gloo")
            self._background = ThreadPoolExecutor(1, "checkpoint")

    def save(
        self, step: int, policy: Policy, state: dict[str, Any], metrics: Mapping[str, float], expire: bool = True
    ) -> None:
        """Write the state after `step` steps, unless the newest checkpoint holds it.

        This first waits for an unfinished background save.

        Args:
            step: number of completed steps.
            policy: the policy with its weights and optimizer state.
            state: state of the run, for ``run.json``.
            metrics: the latest metrics, one of which ``checkpoint.keep_best`` may name.
            expire: whether older checkpoints may be deleted. Not if these weights are in doubt.

        Raises:
            UserError: if weights are not finite or files cannot be written. Earlier checkpoints are unchanged.
        """
        self.finish()
        if self._held == step:  # written again, it could be lost in between
            return
        check_finite_weights(policy, f"the checkpoint of step {step} is not written, and earlier ones are kept")
        record = {
            "step": step,
            "model": fingerprint(policy.bridge.hf_config, policy.bridge.dtype),
            "saved_at": time.time(),
            **state,
            **({} if policy.adapter_record is None else {RECORD: policy.adapter_record}),
            "distributed_optimizer": optimizer_state.is_distributed(policy.optimizer),
            **self._score(metrics),
        }
        partial = self.folder / f"step_{step}.partial"
        error: BaseException | None = None
        try:
            if policy.layout.is_main:
                remove_leftovers(self.folder)
                partial.mkdir(parents=True)
        except OSError as failure:
            error = failure
        self._raise_if_any(error, step)
        writing: Future[dict[str, str]] = Future()
        try:
            sharded = sharded_checkpoint.training_state(policy.model_chunks, policy.optimizer, loading=False)
            writing = sharded_checkpoint.save(sharded, partial, group=self._group, background=self._background)
        except sharded_checkpoint.SAVE_ERRORS as failure:
            error = failure
        self._raise_if_any(error, step)
        self._pending = _Pending(step, record, writing, expire)
        if self._background is None:
            self.finish()

    def check_keep_best(self, metrics: Mapping[str, float]) -> None:
        """Refuse a ``checkpoint.keep_best`` that names no metric of this run; called after every step.

        Args:
            metrics: the latest metrics. There are none before the first evaluation.

        Raises:
            UserError: if they do not include the metric.
        """
        best = self.config.keep_best or ""
        known = [name for name in metrics if name.startswith("evaluation/") == best.startswith("evaluation/")]
        if best and known and best not in known:
            raise UserError(f"checkpoint.keep_best={best} is not a metric of this run: use one of {', '.join(known)}")

    def _score(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Return the value of the metric that ``checkpoint.keep_best`` names, as an entry of ``run.json``."""
        score = metrics.get(self.config.keep_best or "")  # none before the first step of a resumed run
        return {} if score is None or not math.isfinite(score) else {"score": score}

    def poll(self) -> None:
        """Complete the checkpoint of a background save if it has ended on every process; raises like `save`."""
        if self._pending is None:
            return
        what = "the state of a checkpoint that is written in the background"
        if not waiting.any_rank(not self._pending.writing.done(), what):
            self.finish()

    def finish(self) -> None:
        """Wait for the checkpoint that is being written, if any, and complete it; raises like `save`."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        partial = self.folder / f"step_{pending.step}.partial"
        error: BaseException | None = None
        digests: dict[str, str] = {}
        try:
            digests = pending.writing.result()
        except sharded_checkpoint.SAVE_ERRORS as failure:
            error = failure
        self._raise_if_any(error, pending.step)
        written = waiting.all_gather_over_job(digests, f"the files of checkpoint step_{pending.step}")
        try:
            if dist.get_rank() == 0:
                write_record(partial, pending.record, {name: text for files in written for name, text in files.items()})
                place(partial, pending.step, self._damaged, self.config, expire=pending.expire)
        except OSError as failure:
            error = failure
        self._raise_if_any(error, pending.step)
        self._held, self._damaged = pending.step, {}
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

    def load_newest(self, policy: Policy) -> dict[str, Any] | None:
        """Load the newest checkpoint that is not damaged into `policy`, and warn of damaged ones.

        Returns:
            its record, which contains the run's state; None if no checkpoint has been written yet.

        Raises:
            UserError: see `load`; also if every checkpoint is damaged or missing.
        """
        found = (steps(self.folder), faults(self.folder)) if dist.get_rank() == 0 else None
        candidates, other = waiting.broadcast_from_main(found, f"rank 0 to list {self.folder}")
        record = None
        while candidates and record is None:
            step = candidates.pop()
            try:
                record = self.load(step, policy)
            except DamagedError as error:
                self._damaged[step] = str(error)
        problems = [f"step_{step} is damaged ({reason})" for step, reason in self._damaged.items()]
        problems += [text for name, text in other.items() if record is None or name == "latest"]
        if record is None and problems:
            raise UserError(
                f"no checkpoint of {self.folder} can be used: {'; '.join(problems)}: restore a checkpoint from a copy, "
                "or remove this folder to start from step 0"
            )
        if record is not None and problems and dist.get_rank() == 0:
            text = f"{self.folder}: {'; '.join(problems)}: continuing from step_{record['step']}"
            print(f"warning: {text}", file=sys.stderr)
        return record

    def load(self, step: int, policy: Policy) -> dict[str, Any]:
        """Load the checkpoint of `step` into `policy`; returns its record, which contains the run's state.

        Raises:
            DamagedError: on every process, if it is not what was written.
            UserError: if it belongs to another model, has optimizer state of another format, or cannot be loaded.
        """
        remedy = "set model.path to its model, or choose another run_directory"
        record = load_checkpoint(self.folder / f"step_{step}", policy, remedy, step=step)
        self._held = step
        return record
