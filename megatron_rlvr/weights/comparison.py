"""Compare tensors, and a folder of weights, with what they should be, bit for bit."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from megatron_rlvr.errors import UserError
from megatron_rlvr.weights.huggingface_folder import read_tensor, tensor_files


def bit_equal(expected: Tensor, actual: Tensor) -> bool:
    """Whether two tensors have the same bits. Unlike in torch.equal, NaN equals NaN."""
    if (expected.dtype, expected.shape) != (actual.dtype, actual.shape):
        return False
    return torch.equal(expected.contiguous().view(-1).view(torch.uint8), actual.contiguous().view(-1).view(torch.uint8))


def compare_folder(folder: Path, expected: Iterable[tuple[str, Tensor]]) -> int:
    """Compare every tensor of a Hugging Face folder; returns the number of tensors.

    Args:
        folder: the folder.
        expected: every tensor that it should hold, by name; consumed one at a time.

    Raises:
        UserError: for the first tensor that differs or that only one side has.
    """
    files = tensor_files(folder)
    seen: set[str] = set()
    for name, tensor in expected:
        seen.add(name)
        if name not in files:
            raise UserError(f"verification failed: {folder} lacks {name}")
        if not bit_equal(tensor, read_tensor(files[name], name)):
            raise UserError(f"verification failed: {name} differs from the one in {files[name]}")
    if unknown := sorted(files.keys() - seen):
        raise UserError(f"verification failed: {folder} holds {unknown[0]}, which it should not")
    return len(seen)


def compare_new_folder(folder: Path, expected: Iterable[tuple[str, Tensor]]) -> int:
    """As `compare_folder`, for a folder that was just written: it is removed if anything differs."""
    try:
        return compare_folder(folder, expected)
    except UserError:
        shutil.rmtree(folder)
        raise
