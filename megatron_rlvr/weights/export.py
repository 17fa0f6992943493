"""Export this rank's model chunks to a Hugging Face folder, and adapters to one of PEFT."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_rlvr.megatron import waiting
from megatron_rlvr.megatron.bridge import PolicyBridge
from megatron_rlvr.megatron.model import PolicyModel
from megatron_rlvr.weights.huggingface_folder import write_folder
from megatron_rlvr.weights.peft_folder import write_adapters
from megatron_rlvr.weights.shape_checks import rounding, stored_dtype
from megatron_rlvr.weights.whole_weights import check_finite

_BYTES_PER_TURN = 2**30


def export_folder(
    bridge: PolicyBridge,
    model_chunks: Sequence[PolicyModel],
    folder: Path,
    *,
    write: bool,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a complete Hugging Face folder. Collective over the job.

    Args:
        bridge: bridge of the model. Config and tokenizer are copied from its folder.
        model_chunks: this rank's model chunks.
        folder: folder to write; replaced if it exists.
        write: True on the one process that writes.
        dtype: dtype of the weights in the folder, which its config.json names; None keeps that of the policy.

    Raises:
        UserError: if the folder cannot be written, or a weight is not finite in `dtype` or merged with its adapter.
    """

    def converted(tensors: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in tensors:
            stored = tensor.to(stored_dtype(name, tensor.dtype, dtype, bridge.hf_config))
            check_finite(stored, f"{folder}: {name}")
            yield name, stored

    def write_converted(tensors: Iterator[tuple[str, Tensor]]) -> None:
        if rounded := rounding({bridge.dtype}, dtype or bridge.dtype):
            print(f"warning: {folder}: {rounded}", file=sys.stderr)
        write_folder(folder, converted(tensors), companions=bridge.path)

    write_in_turns(bridge.export(model_chunks), folder, write_converted if write else None)


def export_adapters(
    bridge: PolicyBridge,
    model_chunks: Sequence[PolicyModel],
    folder: Path,
    record: Mapping[str, Any],
    *,
    write: bool,
) -> None:
    """Write the adapters as a folder in PEFT's format. Collective over the job.

    Args:
        bridge, model_chunks: as in `export_folder`.
        folder: folder to write; replaced if it exists.
        record: result of `adapter_record`.
        write: True on the one process that writes.

    Raises:
        UserError: if the folder cannot be written.
    """
    tensors = bridge.adapter_export(model_chunks).tensors()
    write_in_turns(tensors, folder, partial(write_adapters, folder, record=record) if write else None)


def write_in_turns(
    tensors: Iterable[tuple[str, Tensor]], folder: Path, write: Callable[[Iterator[tuple[str, Tensor]]], object] | None
) -> None:
    """Write an export on one process, between whose turns the others wait. Collective over the job.

    Args:
        tensors: the export.
        folder: the folder that is written, for what the others wait for.
        write: writes the tensors, which are in host memory; None on the processes that do not write.
    """
    turns = _in_turns(tensors, f"{folder} to be written", keep=write is not None)
    if write is not None:
        write(turns)
    for _ in turns:  # every process must take part in gathering every tensor
        pass


def _in_turns(tensors: Iterable[tuple[str, Tensor]], what: str, *, keep: bool) -> Iterator[tuple[str, Tensor]]:
    """Gather up to 1 GiB of tensors, yield them from host memory, wait for the other processes, and so on.

    So no process waits for the disk in a collective of the export, on a GPU in NCCL.

    Args:
        tensors: an export, which is collective.
        what: what the processes wait for.
        keep: whether this process writes the tensors; others yield none.
    """
    gathered: list[tuple[str, Tensor]] = []
    size = 0
    for name, tensor in tensors:
        if keep:
            gathered.append((name, tensor.detach().to("cpu", copy=True)))
        size += tensor.nbytes
        if size >= _BYTES_PER_TURN:
            yield from gathered
            gathered, size = [], 0
            waiting.barrier(what)
    yield from gathered
    waiting.barrier(what)
