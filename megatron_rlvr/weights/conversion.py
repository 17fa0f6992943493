"""Weights between Hugging Face folders and Megatron checkpoints (torch_dist), one weight at a time.

A torch_dist checkpoint knows the whole tensor of every shard, so it can be read under another tensor and pipeline
parallel layout than it was written under: converting between layouts is reading. What was begun stays in a folder
``NAME.partial`` with the files that are whole, and the next start goes on from there if its input is the same.
"""

from __future__ import annotations

import json
import logging
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from torch import Tensor

from megatron_rlvr.atomic_write import write_text
from megatron_rlvr.errors import UserError
from megatron_rlvr.megatron.bridge import PolicyBridge
from megatron_rlvr.training.checkpoint import check_same_model, fingerprint, is_whole
from megatron_rlvr.weights.huggingface_folder import (
    SHARD_BYTES,
    copy_companions,
    read_tensor,
    shard_names,
    tensor_files,
    write_index,
)
from megatron_rlvr.weights.safetensors_writer import is_whole as is_whole_shard
from megatron_rlvr.weights.safetensors_writer import nbytes, plan_shards, write_shard
from megatron_rlvr.weights.streamed_checkpoint import StreamedLoad, StreamedSave, reason
from megatron_rlvr.weights.whole_weights import WholeWeights

Progress = Callable[[str], None]
_INPUT = "input.json"

# It calls a folder that is written to its end "old incomplete".
logging.getLogger("megatron.core.dist_checkpointing.serialization").setLevel(logging.ERROR)


def to_megatron(bridge: PolicyBridge, target: Path, say: Progress, verify: bool) -> int:
    """Write the weights of the bridge's folder as a Megatron checkpoint with ``run.json`` beside.

    Returns:
        the number of Hugging Face tensors compared, 0 without `verify`.

    Raises:
        UserError: when the folder cannot be read, the target not written, or a tensor differs.
    """
    files = tensor_files(bridge.path)
    weights = WholeWeights(bridge)
    partial = _begin(target, {"folder": str(bridge.path.resolve()), "files": _sizes(set(files.values()))}, say)
    say(f"writing {target}; the largest weight has {weights.largest_bytes() / 1024**3:.2f} GiB")
    strategy = StreamedSave(
        lambda name: weights.pieces(name, weights.from_huggingface(name, files)),
        lambda done, count: say(f"{done} of {count} files"),
    )
    try:
        dist_checkpointing.save({"model": dict(weights.state)}, str(partial), sharded_strategy=strategy)
        record = {"step": 0, "model": fingerprint(bridge), "source": str(bridge.path)}
        if verify:
            say("comparing every tensor")
        compared = _compare(weights, StreamedLoad(partial), bridge.path) if verify else 0
        (partial / _INPUT).unlink()
        record["files"] = {file.name: file.stat().st_size for file in sorted(partial.iterdir())}
        write_text(partial / "run.json", json.dumps(record, indent=1))
        partial.rename(target)
    except UserError:  # what was made of a wrong input is of no use
        shutil.rmtree(partial, ignore_errors=True)
        raise
    except OSError as error:
        raise _cannot_write(target, error) from error
    return compared


def to_huggingface(
    bridge: PolicyBridge, checkpoint: Path, target: Path, say: Progress, verify: bool, shard_bytes: int = SHARD_BYTES
) -> int:
    """Write a Megatron checkpoint as a complete Hugging Face folder, companions from the bridge's folder.

    Returns:
        the number of tensors compared, 0 without `verify`.

    Raises:
        UserError: when the checkpoint is of another model or damaged, the target not writable, or a tensor differs.
    """
    loaded = open_checkpoint(bridge, checkpoint)
    weights = WholeWeights(bridge)
    described = weights.huggingface_tensors()
    given = {"checkpoint": str(checkpoint.resolve()), "files": _sizes(set(checkpoint.iterdir())), "shard": shard_bytes}
    partial = _begin(target, given, say)
    say(f"writing {target}; the largest weight has {weights.largest_bytes() / 1024**3:.2f} GiB")
    shards = plan_shards(described, shard_bytes)
    tensors = _tensors(weights, loaded)
    try:
        for number, (names, file) in enumerate(zip(shards, shard_names(len(shards)), strict=True)):
            of_this = {name: described[name] for name in names}
            if not is_whole_shard(partial / file, of_this):
                write_shard(partial / file, of_this, ((name, tensors(name)) for name in names))
            say(f"{number + 1} of {len(shards)} files")
        if len(shards) > 1:
            write_index(partial, shards, sum(map(nbytes, described.values())))
        copy_companions(bridge.path, partial)
        if verify:
            say("comparing every tensor")
        compared = _compare(weights, loaded, partial) if verify else 0
        (partial / _INPUT).unlink()
        partial.rename(target)
    except UserError:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    except OSError as error:
        raise _cannot_write(target, error) from error
    return compared


def open_checkpoint(bridge: PolicyBridge, checkpoint: Path) -> StreamedLoad:
    """A Megatron checkpoint of any layout, a converted one or one of training, if it is of the bridge's model.

    Raises:
        UserError: when the checkpoint is missing, damaged, or of another model.
    """
    try:
        record = json.loads((checkpoint / "run.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{checkpoint} is no whole checkpoint ({reason(error)}): give a folder with run.json, such as "
            "RUN/checkpoints/step_100"
        ) from error
    check_same_model(record["model"], fingerprint(bridge), checkpoint, remedy="name its model as the one to convert")
    if not is_whole(checkpoint):
        raise UserError(f"{checkpoint} cannot be read: files are missing or cut short; take another checkpoint")
    return StreamedLoad(checkpoint)


def peak_gib() -> float:
    """The largest resident memory of this process so far, in GiB."""
    try:
        # getrusage would tell of the process that started this one, too.
        [line] = [text for text in Path("/proc/self/status").read_text().splitlines() if text.startswith("VmHWM:")]
        return int(line.split()[1]) / 1024**2
    except (OSError, ValueError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2


def _tensors(weights: WholeWeights, loaded: StreamedLoad) -> Callable[[str], Tensor]:
    """Gives the checkpoint's Hugging Face tensors by name; holds those of one weight, so ask for them in order."""
    source: dict[str, str] = {}
    for name in weights.names:
        for key in weights.formats[name].names:
            source.setdefault(key, name)
    held: dict[str, Tensor] = {}

    def tensor(key: str) -> Tensor:
        if key not in held:
            held.clear()
            held.update(_load(weights, loaded, source[key]))
        return held[key]

    return tensor


def _load(weights: WholeWeights, loaded: StreamedLoad, name: str) -> Iterator[tuple[str, Tensor]]:
    """The Hugging Face tensors of one weight of a checkpoint."""
    weight = weights.empty(name)
    loaded.fill(weights.pieces(name, weight))
    return weights.to_huggingface(name, weight)


def _compare(weights: WholeWeights, loaded: StreamedLoad, folder: Path) -> int:
    """Compare every tensor of a checkpoint with the folder's, bit for bit; returns how many.

    Raises:
        UserError: naming the first tensor that differs, or those that only one side has.
    """
    files = tensor_files(folder)
    seen: set[str] = set()
    wrong = None
    for name in weights.names:
        for key, tensor in _load(weights, loaded, name):
            seen.add(key)
            if key not in files:
                wrong = wrong or f"{folder} lacks {key}"
            elif wrong is None and not _same(read_tensor(files[key], key), tensor):
                wrong = f"{key} differs from the one in {files[key]}"
    # A tied model's folder may name the embedding twice.
    left = sorted(files.keys() - seen - {"lm_head.weight"})
    if wrong is None and left:
        wrong = f"{folder} holds {len(left)} tensors the model does not have, {left[0]} for one"
    if wrong is not None:
        raise UserError(f"verification failed: {wrong}")
    return len(seen)


def _same(expected: Tensor, found: Tensor) -> bool:
    """Whether two tensors are equal to the bit, whatever numbers they hold."""
    if (expected.dtype, expected.shape) != (found.dtype, found.shape):
        return False
    return torch.equal(expected.contiguous().view(-1).view(torch.uint8), found.contiguous().view(-1).view(torch.uint8))


def _begin(target: Path, given: dict[str, Any], say: Progress) -> Path:
    """The folder that is written beside `target`: new, or the one of an earlier start from the same input.

    Raises:
        UserError: when the target exists or the disk refuses.
    """
    if target.exists():
        raise UserError(f"{target} exists: remove it or name another output")
    partial = target.with_name(target.name + ".partial")
    try:
        if (partial / _INPUT).is_file() and json.loads((partial / _INPUT).read_text()) == given:
            say(f"going on with {partial}")
            return partial
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write_text(partial / _INPUT, json.dumps(given))
    except (OSError, ValueError) as error:
        raise _cannot_write(target, error) from error
    return partial


def _sizes(files: set[Path]) -> dict[str, list[int]]:
    """Size and time of change of files, to know an input again."""
    return {str(file): [file.stat().st_size, file.stat().st_mtime_ns] for file in sorted(files)}


def _cannot_write(target: Path, error: BaseException) -> UserError:
    return UserError(f"{target} cannot be written: {reason(error)}; make room and start again, it will go on")
