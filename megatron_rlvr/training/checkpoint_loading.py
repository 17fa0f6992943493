"""Load a checkpoint into the policy: to continue its run, or to begin a new one from it."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_rlvr import checksums
from megatron_rlvr.checksums import DamagedError
from megatron_rlvr.errors import UserError
from megatron_rlvr.megatron import optimizer_state, sharded_checkpoint, waiting
from megatron_rlvr.training.checkpoints_folder import steps
from megatron_rlvr.training.config import CheckpointConfig
from megatron_rlvr.training.policy import Policy, weights_are_finite_everywhere
from megatron_rlvr.weights.adapter_record import check_same_adapters, stored_record
from megatron_rlvr.weights.checkpoint_folder import check_same_model, fingerprint, open_folder
from megatron_rlvr.weights.peft_folder import is_adapter_folder, read_adapters

_WRITER = re.compile(r"__([0-9]+)_[0-9]+\.distcp")


def load_checkpoint(
    folder: Path, policy: Policy, remedy: str, *, step: int | None = None, optimizer: bool = True
) -> dict[str, Any]:
    """Load the checkpoint in `folder`, of any layout, into `policy`; returns its record. Collective over the job.

    The output of a conversion has no optimizer state. Its weights are loaded, and the optimizer starts anew.

    Args:
        folder: a checkpoint of a run, or the output of a conversion.
        policy: the policy.
        remedy: what to do if the checkpoint is of another model: the end of an error.
        step: the step that the folder is named after; None if its name says nothing.
        optimizer: whether to load the optimizer state, if there is any.

    Raises:
        DamagedError: on every process, if it is not what was written.
        UserError: if it belongs to another model, has optimizer state of another format, or cannot be loaded.
    """
    opened = _open(folder, step) if dist.get_rank() == 0 else None
    record, listed, adapters, damage = waiting.broadcast_from_main(opened, f"rank 0 to open {folder}")
    if damage:
        raise DamagedError(damage)
    check_same_model(record["model"], fingerprint(policy.bridge.hf_config, policy.bridge.dtype), folder, remedy=remedy)
    check_same_adapters(adapters, policy.adapter_record, folder)
    optimizer = optimizer and has_optimizer_state(record)
    distributed = optimizer_state.is_distributed(policy.optimizer)
    if optimizer and record.get("distributed_optimizer", distributed) != distributed:
        raise UserError(
            f"{folder} was written with parallel.distributed_optimizer={str(not distributed).lower()}, whose state "
            f"has another format: set it back{'' if step is not None else ', or set checkpoint.start_optimizer=false'}"
        )
    if listed is not None:
        _check_files(folder, listed)
    elif dist.get_rank() == 0:
        print(f"warning: {folder} has no checksums: if it is damaged, that may go unnoticed", file=sys.stderr)
    with_state = policy.optimizer if optimizer else None
    sharded = sharded_checkpoint.training_state(policy.model_chunks, with_state, loading=True)
    try:
        loaded = sharded_checkpoint.load(sharded, folder)
    except sharded_checkpoint.LOAD_ERRORS as error:
        reason = sharded_checkpoint.root_cause(error)
        if listed is None:
            raise DamagedError(f"it cannot be read: {reason}") from error
        raise UserError(
            f"{folder} cannot be loaded although its files are intact ({reason}): load it with the versions of "
            "torch and megatron-core that wrote it"
        ) from error
    sharded_checkpoint.load_training_state(policy.model_chunks, with_state, loaded)
    if with_state is None:
        policy.optimizer.reload_model_params()  # the master weights
    if not weights_are_finite_everywhere(policy):
        raise DamagedError("its weights are not finite")
    return record


def has_optimizer_state(record: Mapping[str, Any]) -> bool:
    """Whether the checkpoint with this record holds optimizer state; the output of a conversion does not."""
    return "source" not in record


def start_from(config: CheckpointConfig, policy: Policy) -> bool:
    """Load the weights that a new run begins with, and the optimizer state if there is any. Collective over the job.

    The source is a run directory, of which the newest checkpoint that is not damaged is taken; one of its checkpoints;
    the output of ``tools/convert_checkpoint.py to-megatron``; or adapters in PEFT's format.

    Args:
        config: section ``checkpoint`` of the configuration, with the source and whether to load its optimizer state.
        policy: the policy.

    Returns:
        whether the configuration names a source; if not, the policy keeps the weights of ``model.path``.

    Raises:
        UserError: if there is no checkpoint that can be used, or it belongs to another model.
    """
    source, optimizer = config.start_from, config.start_optimizer
    if source is None:
        return False
    if is_adapter_folder(Path(source)):
        _start_from_adapters(Path(source), policy)
        return True
    found = checkpoints_in(Path(source)) if dist.get_rank() == 0 else None
    candidates = waiting.broadcast_from_main(found, f"rank 0 to list {source}")
    damage = []
    for folder in candidates:
        try:
            remedy = "set model.path and model.dtype to its model, or checkpoint.start_from to another folder"
            record = load_checkpoint(folder, policy, remedy, optimizer=optimizer)
        except DamagedError as error:
            damage.append(f"{folder.name} is damaged ({error})")
            continue
        if dist.get_rank() == 0:
            if damage:
                print(f"warning: {source}: {'; '.join(damage)}: starting from {folder.name}", file=sys.stderr)
            state = "optimizer state" if optimizer and has_optimizer_state(record) else "a fresh optimizer"
            print(f"starting from {folder}: its weights and {state}", file=sys.stderr)
        return True
    raise UserError(
        f"checkpoint.start_from={source}: {'; '.join(damage) or 'there is no checkpoint'}: give a run directory, its "
        "checkpoints/step_N, the output of tools/convert_checkpoint.py to-megatron, or adapters in PEFT's format"
    )


def _start_from_adapters(folder: Path, policy: Policy) -> None:
    """Begin with the adapters in a folder of PEFT, and a fresh optimizer. Collective over the job.

    Raises:
        UserError: if they do not belong to the policy.
    """
    if policy.adapter_record is None:
        raise UserError(f"checkpoint.start_from={folder} holds adapters, but lora.rank=0 trains all weights: set it")
    warning = read_adapters(folder, policy.model_chunks, policy.bridge.hf_config, policy.adapter_record)
    policy.optimizer.reload_model_params()  # the master weights
    if not weights_are_finite_everywhere(policy):
        raise UserError(f"{folder} holds values that are NaN or infinite: save the adapters again")
    if dist.get_rank() == 0:
        if warning:
            print(f"warning: {warning}", file=sys.stderr)
        print(f"starting from {folder}: its adapters and a fresh optimizer", file=sys.stderr)


def checkpoints_in(source: Path) -> list[Path]:
    """Return the checkpoints that a folder stands for, newest first: itself, or those of a run."""
    if not steps(source) and not (source / "checkpoints").is_dir():
        return [source] if (source / "run.json").is_file() else []
    folder = source / "checkpoints" if (source / "checkpoints").is_dir() else source
    return [folder / f"step_{step}" for step in reversed(steps(folder))]


def _open(
    folder: Path, step: int | None
) -> tuple[dict[str, Any], dict[str, str] | None, dict[str, Any] | None, str | None]:
    """Return record, checksums and the record of adapters of a checkpoint, and what is wrong with it, if anything."""
    try:
        record, listed = open_folder(folder)
        adapters = stored_record(record)
    except DamagedError as error:
        return {}, None, None, str(error)
    return (
        record,
        listed,
        adapters,
        None if step in (None, record["step"]) else f"its run.json is of step {record['step']}",
    )


def _check_files(folder: Path, listed: Mapping[str, str]) -> None:
    """Compare the files of a checkpoint with their checksums. Collective over the job, whose ranks divide the files.

    A rank reads the file that the same rank wrote, because it needs most of it in this layout: loading then finds it in
    the page cache of its node.

    Raises:
        DamagedError: on every process, for a file that differs.
    """
    world, mine = dist.get_world_size(), []
    for number, name in enumerate(listed):
        writer = _WRITER.fullmatch(name)
        if (int(writer[1]) if writer else number) % world == dist.get_rank():
            mine.append(name)
    damage = None
    try:
        checksums.check_files(folder, listed, mine)
    except DamagedError as error:
        damage = str(error)
    for found in waiting.all_gather_over_job(damage, f"the checksums of {folder}"):
        if found:
            raise DamagedError(found)
