"""Buckets of weights in transit: many tensors of one dtype, contiguous in one flat buffer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Bucket:
    """Whole Hugging Face tensors in one buffer.

    Attributes:
        flat: uint8 [bytes], the tensors one after the other without gaps.
        dtype: dtype of all tensors.
        names, shapes: name and shape of each tensor, in the order of `flat`.
        last: whether this is the last bucket.
    """

    flat: Tensor
    dtype: torch.dtype
    names: list[str] = field(default_factory=list)
    shapes: list[torch.Size] = field(default_factory=list)
    last: bool = False

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every tensor by name, as a view of the buffer."""
        start = 0
        for name, shape in zip(self.names, self.shapes, strict=True):
            end = start + shape.numel() * self.dtype.itemsize
            yield name, self.flat[start:end].view(self.dtype).view(shape)
            start = end


def buckets(tensors: Iterable[tuple[str, Tensor]], size: int, allocate: Callable[[int], Tensor]) -> Iterator[Bucket]:
    """Copy tensors into buckets of at most `size` bytes, in order; a larger tensor gets its own bucket.

    A bucket is released before the next one is allocated. If the caller also releases it, only one is in memory at a
    time.

    Args:
        tensors: tensors by name. A tensor may be overwritten when the next one is requested.
        size: maximum size of a bucket, in bytes.
        allocate: returns a uint8 buffer of the given number of bytes.
    """
    bucket: Bucket | None = None
    buffer = torch.empty(0, dtype=torch.uint8)
    used = 0
    for name, tensor in tensors:
        if bucket is None or bucket.dtype != tensor.dtype or used + tensor.nbytes > len(buffer):
            if bucket is not None:
                bucket.flat = buffer[:used]
                yield bucket
                del bucket, buffer
            buffer, used = allocate(max(size, tensor.nbytes)), 0
            bucket = Bucket(buffer, tensor.dtype)
        buffer[used : used + tensor.nbytes].view(tensor.dtype).copy_(tensor.detach().reshape(-1))
        used += tensor.nbytes
        bucket.names.append(name)
        bucket.shapes.append(tensor.shape)
    if bucket is not None:
        bucket.flat, bucket.last = buffer[:used], True
        yield bucket
