"""Weights between Hugging Face folders and Megatron checkpoints (torch_dist).

A torch_dist checkpoint knows the whole tensor of every shard, so it can be read under another tensor and pipeline
parallel layout than it was written under: converting between layouts is reading.
"""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from torch.distributed.checkpoint.api import CheckpointException

from megatron_rlvr.backend import parallel
from megatron_rlvr.backend.checkpoint import DirectSave, check_same_model, fingerprint
from megatron_rlvr.backend.huggingface import PolicyBridge
from megatron_rlvr.backend.model import PolicyModel
from megatron_rlvr.backend.model_folder import SHARD_BYTES, read_tensor, tensor_files
from megatron_rlvr.errors import UserError

Progress = Callable[[str], None]


def to_megatron(bridge: PolicyBridge, target: Path, main: bool, say: Progress, verify: bool) -> int:
    """Write the weights of the bridge's folder as a Megatron checkpoint with ``run.json`` beside. Collective.

    Returns:
        the number of Hugging Face tensors compared, 0 without `verify`.

    Raises:
        UserError: when the folder cannot be read, the target not written, or a tensor differs.
    """
    [model] = bridge.build()
    say(f"reading {bridge.path}")
    bridge.load([model])
    partial = target.with_name(target.name + ".partial")
    if main:
        if target.exists():
            raise UserError(f"{target} exists: remove it or name another output")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    say(f"writing {target}")
    try:
        dist_checkpointing.save(
            {"model": model.sharded_state_dict()},
            str(partial),
            sharded_strategy=DirectSave(),
        )
        if main:
            record = {"step": 0, "model": fingerprint(bridge), "source": str(bridge.path)}
            (partial / "run.json").write_text(json.dumps(record, indent=1))
    except (OSError, CheckpointException) as error:
        raise UserError(f"{target} cannot be written: {_first_line(error)}") from error
    compared = 0
    if verify:
        with torch.no_grad():
            for parameter in model.parameters():  # so that a weight the checkpoint lacks cannot pass
                parameter.fill_(float("nan"))
        load_weights(bridge, model, partial)
        say("comparing every tensor")
        compared = compare(bridge.export([model]), bridge.path)
    dist.barrier()
    if main:
        partial.rename(target)
    dist.barrier()
    return compared


def to_huggingface(
    bridge: PolicyBridge,
    checkpoint: Path,
    target: Path,
    main: bool,
    say: Progress,
    verify: bool,
    shard_bytes: int = SHARD_BYTES,
) -> int:
    """Write a Megatron checkpoint as a complete Hugging Face folder, companions from the bridge's folder. Collective.

    Returns:
        the number of tensors compared, 0 without `verify`.

    Raises:
        UserError: when the checkpoint is of another model or damaged, the target not writable, or a tensor differs.
    """
    if target.exists():
        raise UserError(f"{target} exists: remove it or name another output")
    [model] = bridge.build()
    say(f"reading {checkpoint}")
    load_weights(bridge, model, checkpoint)
    say(f"writing {target}")
    bridge.save([model], target, write=main, shard_bytes=shard_bytes)
    dist.barrier()
    if not verify:
        return 0
    say("comparing every tensor")
    return compare(bridge.export([model]), target)


def load_weights(bridge: PolicyBridge, model: PolicyModel, checkpoint: Path) -> None:
    """Fill `model` from a Megatron checkpoint of any layout: a converted one or one of training. Collective.

    Raises:
        UserError: when the checkpoint is missing, damaged, or of another model.
    """
    try:
        record = json.loads((checkpoint / "run.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{checkpoint} is no whole checkpoint ({_first_line(error)}): give a folder with run.json, such as "
            "RUN/checkpoints/step_100"
        ) from error
    check_same_model(record["model"], fingerprint(bridge), checkpoint, remedy="name its model as the one to convert")
    try:
        loaded = dist_checkpointing.load({"model": model.sharded_state_dict()}, str(checkpoint))
    except (OSError, CheckpointingException, CheckpointException, RuntimeError, KeyError) as error:
        raise UserError(f"{checkpoint} cannot be read: {_first_line(error)}") from error
    model.load_state_dict(loaded["model"])


def compare(exported: Iterator[tuple[str, torch.Tensor]], folder: Path) -> int:
    """Compare every exported tensor with the folder's, bit for bit; returns how many. Collective.

    Raises:
        UserError: naming the first tensor that differs, or those that only one side has.
    """
    files = tensor_files(folder)
    seen: set[str] = set()
    wrong = None
    for name, tensor in exported:  # to the end on every process, for the export is collective
        seen.add(name)
        if name not in files:
            wrong = wrong or f"{folder} lacks {name}"
            continue
        expected = read_tensor(files[name], name)
        if wrong is None and not (expected.dtype == tensor.dtype and torch.equal(expected, tensor.cpu())):
            wrong = f"{name} differs from the one in {files[name]}"
    # A tied model's folder may name the embedding twice.
    left = sorted(files.keys() - seen - {"lm_head.weight"})
    if wrong is None and left:
        wrong = f"{folder} holds {len(left)} tensors the model does not have, {left[0]} for one"
    if parallel.any_rank(wrong is not None):
        raise UserError(f"verification failed: {wrong or 'on another rank'}")
    return len(seen)


def peak_gib() -> float:
    """The largest resident memory of this process so far, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
