"""Write safetensors files one tensor at a time, for tensors whose dtypes and shapes are known beforehand.

A safetensors file consists of eight bytes with the length of the header, a JSON header, and the tensors without gaps.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from megatron_rlvr.atomic_write import atomic_file

Described = Mapping[str, tuple[torch.dtype, torch.Size]]
"""dtype and shape of every tensor, by name, in the order of the file."""
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16"}


def plan_shards(tensors: Described, shard_bytes: int) -> list[list[str]]:
    """Return the tensor names of each file, in order. A file has at most `shard_bytes`, unless a tensor is larger."""
    shards: list[list[str]] = []
    size = 0
    for name in tensors:
        if not shards or size + nbytes(tensors[name]) > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += nbytes(tensors[name])
    return shards


def nbytes(described: tuple[torch.dtype, torch.Size]) -> int:
    """Return the size in bytes of a tensor with this dtype and shape."""
    dtype, shape = described
    return math.prod(shape) * dtype.itemsize


def write_shard(path: Path, described: Described, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write one file, which gets its name when it is complete.

    Args:
        path: the file.
        described: dtypes and shapes of `tensors`.
        tensors: the tensors by name, in the order of `described`; consumed one at a time.

    Raises:
        OSError: if the file cannot be written.
        ValueError: if the tensors differ from `described`.
    """
    expected = iter(described.items())
    with atomic_file(path) as file:
        file.write(_header(described))
        for name, tensor in tensors:
            key, (dtype, shape) = next(expected)
            if (name, tensor.dtype, tensor.shape) != (key, dtype, shape):
                raise ValueError(
                    f"{path}: expected {key} {dtype} {list(shape)}, found {name} {tensor.dtype} {list(tensor.shape)}"
                )
            file.write(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data)
        if next(expected, None) is not None:
            raise ValueError(f"{path}: found fewer tensors than the {len(described)} described")


def is_complete(path: Path, described: Described) -> bool:
    """Whether `write_shard` has completed this file."""
    return path.is_file() and path.stat().st_size == len(_header(described)) + sum(map(nbytes, described.values()))


def _header(described: Described) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, (dtype, shape) in described.items():
        end = start + nbytes((dtype, shape))
        entries[name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
