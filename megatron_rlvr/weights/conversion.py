"""Conversion of weights between Hugging Face folders and Megatron checkpoints, one weight at a time.

A torch_dist checkpoint describes whole tensors, so any tensor and pipeline parallel layout can read it, and no
conversion between layouts is needed. Output is written to ``NAME.partial``. If a conversion is killed, the next one
with the same input continues after the files that are complete.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from megatron_rlvr.checked_input import InvalidInputError, field
from megatron_rlvr.checksums import DamagedError, check_files
from megatron_rlvr.errors import UserError
from megatron_rlvr.megatron.bridge import PolicyBridge
from megatron_rlvr.megatron.streamed_checkpoint import StreamedLoad, save_streamed
from megatron_rlvr.weights.adapter_checkpoint import AdapterCheckpoint
from megatron_rlvr.weights.adapter_record import stored_record
from megatron_rlvr.weights.checkpoint_folder import (
    check_same_model,
    fingerprint,
    open_folder,
    read_record,
    write_record,
)
from megatron_rlvr.weights.companions import check_companions, copy_companions
from megatron_rlvr.weights.comparison import bit_equal, compare_new_folder
from megatron_rlvr.weights.huggingface_folder import (
    SHARD_BYTES,
    read_tensor,
    tensor_files,
)
from megatron_rlvr.weights.peft_folder import PREFIX, peft_warning, write_adapters
from megatron_rlvr.weights.resumable_folder import (
    Report,
    begin,
    close_input,
    completing,
    identities,
    write_missing_shards,
)
from megatron_rlvr.weights.shape_checks import check_shapes, rounding, stored_dtype, unused_warning
from megatron_rlvr.weights.whole_weights import WholeWeights, check_finite

Load = Callable[[str], Iterator[tuple[str, Tensor]]]
"""Yields the Hugging Face tensors of a weight, which it is given by its name in the model, by name."""


def to_megatron(bridge: PolicyBridge, target: Path, report: Report, verify: bool) -> int:
    """Write the weights of the bridge's Hugging Face folder as a Megatron checkpoint.

    Args:
        bridge: a bridge with all parallel sizes 1 and the local layers.
        target: folder of the checkpoint; must not exist.
        report: called with lines of progress.
        verify: read the checkpoint back and compare every tensor.

    Returns:
        the number of Hugging Face tensors compared; 0 without `verify`.

    Raises:
        UserError: if the folder cannot be read, the target cannot be written, or a tensor differs.
    """
    files = tensor_files(bridge.path)
    found = check_shapes(files, bridge.hf_config)
    if unused := unused_warning(found):
        report(f"warning: {unused}")
    if rounded := rounding(found.dtypes, bridge.dtype):
        report(f"warning: {rounded}")
    weights = WholeWeights(bridge)
    inputs = {*files.values(), bridge.path / "config.json"}
    source = {"folder": str(bridge.path.resolve()), "files": identities(inputs), "dtype": str(bridge.dtype)}
    unfinished = begin(target, source, report)
    report(f"writing {target}; the largest weight has {weights.largest_bytes() / 1024**3:.2f} GiB")
    compared = 0
    with completing(unfinished, target):
        digests = save_streamed(
            weights.state,
            unfinished,
            pieces=lambda name: weights.pieces(name, weights.from_huggingface(name, files)),
            report=lambda done, count: report(f"{done} of {count} files"),
        )
        if verify:
            report("comparing every tensor")
            compared = _compare(weights, partial(_load, weights, StreamedLoad(unfinished)), bridge.path, bridge.dtype)
        close_input(unfinished)
        model = fingerprint(bridge.hf_config, bridge.dtype)
        write_record(unfinished, {"step": 0, "model": model, "source": str(bridge.path)}, digests)
    return compared


def to_huggingface(
    bridge: PolicyBridge,
    checkpoint: Path,
    target: Path,
    report: Report,
    verify: bool,
    shard_bytes: int = SHARD_BYTES,
    dtype: torch.dtype | None = None,
) -> int:
    """Write a Megatron checkpoint as a complete Hugging Face folder. Adapters are merged into the bridge's weights.

    Args:
        bridge: a bridge with all parallel sizes 1 and the local layers. Config and tokenizer are copied from its
            folder.
        checkpoint: folder of a checkpoint of any layout, from a conversion or from training.
        target: folder to write; must not exist.
        report: called with lines of progress.
        verify: read the folder back and compare every tensor.
        shard_bytes: largest size of a safetensors file, unless a single tensor is larger.
        dtype: dtype of the weights in the folder; None keeps that of the checkpoint.

    Returns:
        the number of tensors compared; 0 without `verify`.

    Raises:
        UserError: if the checkpoint is damaged or belongs to another model, the target cannot be written, or a tensor
            differs.
    """
    check_companions(bridge.path)
    loaded, adapters = open_checkpoint(bridge, checkpoint, report)
    weights = WholeWeights(bridge)
    load = partial(_load, weights, loaded) if adapters is None else partial(_load_merged, weights, adapters)
    dtype = dtype or bridge.dtype
    if rounded := rounding({bridge.dtype}, dtype):
        report(f"warning: {rounded}")
    described = {
        key: (stored_dtype(key, own, dtype, bridge.hf_config), shape)
        for key, (own, shape) in weights.huggingface_tensors().items()
    }
    source = {
        "checkpoint": str(checkpoint.resolve()),
        "files": identities(set(checkpoint.iterdir())),
        "shard": shard_bytes,
    }
    source |= {"dtype": str(dtype)}
    unfinished = begin(target, source, report)
    report(f"writing {target}; the largest weight has {weights.largest_bytes() / 1024**3:.2f} GiB")
    tensors = _tensors(weights, load)
    compared = 0
    with completing(unfinished, target):
        write_missing_shards(
            unfinished, described, lambda name: tensors(name).to(described[name][0]), shard_bytes, report
        )
        copy_companions(bridge.path, unfinished, dtype)
        if verify:
            report("comparing every tensor")
            compared = _compare(weights, load, unfinished, dtype)
    return compared


def to_peft(bridge: PolicyBridge, checkpoint: Path, target: Path, report: Report, verify: bool = False) -> int:
    """Write the adapters of a checkpoint as a folder in PEFT's format; returns the number of their tensors.

    Args:
        bridge: a bridge of the model that the adapters belong to, with all parallel sizes 1 and the local layers.
        checkpoint: a checkpoint from training with ``lora``, of any layout.
        target: folder to write; must not exist.
        report: called with lines of progress.
        verify: read the folder back and compare every tensor; one that differs removes the folder.

    Raises:
        UserError: if the checkpoint is damaged, has no adapters or those of another model, the target cannot be
            written, or a tensor differs.
    """
    if target.exists():
        raise UserError(f"{target} exists: remove it or name another output")
    _, adapters = open_checkpoint(bridge, checkpoint, report)
    if adapters is None:
        raise UserError(f"{checkpoint} holds all weights and no adapters: convert it with to-huggingface")
    tensors = dict(adapters.tensors())
    write_adapters(target, tensors.items(), adapters.record)
    if verify:
        report("comparing every tensor")
        compare_new_folder(target, ((PREFIX + name, tensor) for name, tensor in tensors.items()))
    if warning := peft_warning(bridge.family, adapters.record["target_modules"]):
        report(f"warning: {warning}")
    return len(tensors)


def open_checkpoint(
    bridge: PolicyBridge, checkpoint: Path, report: Report
) -> tuple[StreamedLoad, AdapterCheckpoint | None]:
    """Open a Megatron checkpoint of any layout, from a conversion or from training; returns it and its adapters.

    Raises:
        UserError: if the checkpoint is missing or damaged, or does not belong to the bridge's model.
    """
    try:
        record, listed = open_folder(checkpoint)
        model = fingerprint(bridge.hf_config, bridge.dtype)
        check_same_model(record["model"], model, checkpoint, remedy="name its model as the one to convert")
        if listed is None:
            report(f"warning: {checkpoint} has no checksums: if it is damaged, that may go unnoticed")
        else:
            report(f"comparing {checkpoint} with its checksums")
            check_files(checkpoint, listed)
        adapters = stored_record(record)
    except DamagedError as error:
        raise UserError(f"{checkpoint} cannot be read: {error}; use another checkpoint") from error
    loaded = StreamedLoad(checkpoint)
    return loaded, None if adapters is None else AdapterCheckpoint(bridge, loaded, adapters)


def checkpoint_dtype(checkpoint: Path) -> str:
    """Return the dtype of the weights of a checkpoint, ``float32`` or ``bfloat16``.

    Raises:
        UserError: if the folder is not a checkpoint.
    """
    try:
        name = field(read_record(checkpoint)["model"], "dtype", str).removeprefix("torch.")
        if name not in ("float32", "bfloat16"):
            raise DamagedError(f"its dtype is {name[:40]}")
    except (DamagedError, InvalidInputError) as error:
        raise UserError(
            f"{checkpoint} is not a complete checkpoint ({error}): give a folder with run.json, such as "
            "RUN/checkpoints/step_100"
        ) from error
    return name


def _tensors(weights: WholeWeights, load: Load) -> Callable[[str], Tensor]:
    """Return a function that returns the checkpoint's Hugging Face tensors by name.

    The function keeps the tensors of one weight, so each weight is read once if tensors are requested in order.
    """
    weight_of: dict[str, str] = {}
    for name in weights.names:
        for key in weights.formats[name].names:
            weight_of.setdefault(key, name)
    current: dict[str, Tensor] = {}

    def tensor(key: str) -> Tensor:
        if key not in current:
            current.clear()
            current.update(load(weight_of[key]))
        return current[key]

    return tensor


def _load(weights: WholeWeights, loaded: StreamedLoad, name: str) -> Iterator[tuple[str, Tensor]]:
    """Read one weight of a checkpoint and yield its Hugging Face tensors by name."""
    weight = weights.empty(name)
    loaded.fill(weights.pieces(name, weight))
    check_finite(weight, f"{loaded.folder}: {name}")
    return weights.to_huggingface(name, weight)


def _load_merged(weights: WholeWeights, adapters: AdapterCheckpoint, name: str) -> Iterator[tuple[str, Tensor]]:
    """Yield the Hugging Face tensors of one weight of a policy with adapters, by name."""
    for key, tensor in weights.to_huggingface(name, weights.from_huggingface(name, adapters.files)):
        merged = adapters.merged(key, tensor)
        check_finite(merged, f"{adapters.loaded.folder}: {key}")
        yield key, merged


def _compare(weights: WholeWeights, load: Load, folder: Path, dtype: torch.dtype) -> int:
    """Compare every tensor of a checkpoint with a Hugging Face folder, bit for bit; returns the number of tensors.

    Args:
        weights: the weights of the model.
        load: yields the Hugging Face tensors of a weight of the checkpoint.
        folder: the folder.
        dtype: the dtype of the side that was written, to which the tensors of both sides are converted.

    Raises:
        UserError: for the first tensor that differs or that only one side has.
    """
    files = tensor_files(folder)
    found = check_shapes(files, weights.bridge.hf_config)
    seen: set[str] = set()
    difference = None
    for name in weights.names:
        for key, tensor in load(name):
            seen.add(key)
            if key not in files:
                difference = difference or f"{folder} lacks {key}"
            elif difference is None:
                compared = stored_dtype(key, tensor.dtype, dtype, weights.bridge.hf_config)
                if not bit_equal(read_tensor(files[key], key).to(compared), tensor.to(compared)):
                    difference = f"{key} differs from the one in {files[key]}"
    unknown = sorted(found.files.keys() - seen - found.derived)
    if difference is None and unknown:
        difference = f"{folder} holds {len(unknown)} tensors that the model does not have, such as {unknown[0]}"
    if difference is not None:
        raise UserError(f"verification failed: {difference}")
    return len(seen)
