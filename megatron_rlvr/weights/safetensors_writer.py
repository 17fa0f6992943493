"""Safetensors files written one tensor at a time, for tensors whose dtypes and shapes are known before.

The safetensors format: eight bytes of header length, a JSON header, then the tensors end to end.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from megatron_rlvr.atomic_write import atomic_file

_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16"}
Described = Mapping[str, tuple[torch.dtype, torch.Size]]


def plan_shards(tensors: Described, shard_bytes: int) -> list[list[str]]:
    """Names by file, in order; a file is closed before it would exceed `shard_bytes`."""
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
    """Bytes of a tensor of that dtype and shape."""
    dtype, shape = described
    return math.prod(shape) * dtype.itemsize


def write_shard(path: Path, described: Described, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write one file; it has its name only when it is whole.

    Args:
        path: of the file.
        described: dtype and shape of every tensor, in order.
        tensors: the same tensors in the same order; what is held at once is one.

    Raises:
        OSError: when the disk refuses.
        ValueError: when the tensors are not those described.
    """
    header = _header(described)
    expected = iter(described.items())
    with atomic_file(path) as file:
        file.write(header)
        for name, tensor in tensors:
            key, (dtype, shape) = next(expected)
            if (name, tensor.dtype, tensor.shape) != (key, dtype, shape):
                raise ValueError(f"{name} {tensor.dtype} {list(tensor.shape)} came for {key} {dtype} {list(shape)}")
            file.write(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data)
        if next(expected, None) is not None:
            raise ValueError(f"{path} lacks tensors at its end")


def is_whole(path: Path, described: Described) -> bool:
    """Whether `write_shard` has written this file to its end."""
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
