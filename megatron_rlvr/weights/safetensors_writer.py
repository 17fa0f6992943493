"""Safetensors files written one tensor at a time, for tensors whose dtypes and shapes are known beforehand.

The safetensors format: eight bytes with the length of the header, a JSON header, then the tensors end to end.
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
    """Names per file, in order. A file is closed before it would exceed `shard_bytes`."""
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
    """Bytes of a tensor of a dtype and shape."""
    dtype, shape = described
    return math.prod(shape) * dtype.itemsize


def write_shard(path: Path, described: Described, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write one file; it gets its name when it is complete.

    Args:
        path: of the file.
        described: what `tensors` gives.
        tensors: consumed one at a time.

    Raises:
        OSError: if the disk refuses.
        ValueError: if the tensors are not those described.
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
            raise ValueError(f"{path}: the tensors end before those described")


def is_complete(path: Path, described: Described) -> bool:
    """Whether `write_shard` has written this file."""
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
