"""Buckets of weights in transit: many tensors, contiguous in one flat buffer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class Bucket:
    """Whole Hugging Face tensors in one buffer.

    Attributes:
        flat: uint8 [bytes], the tensors one after the other without gaps, each aligned to its dtype; empty on processes
            that do not hold it.
        names, dtypes, shapes: of each tensor, in the order of `flat`.
        last: whether this is the last bucket.
        shared: what a transport needs to send it, once `flat` is filled.
    """

    flat: Tensor
    names: list[str] = field(default_factory=list)
    dtypes: list[torch.dtype] = field(default_factory=list)
    shapes: list[torch.Size] = field(default_factory=list)
    last: bool = False
    shared: Any = None

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(shape.numel() * dtype.itemsize for shape, dtype in zip(self.shapes, self.dtypes, strict=True))

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every tensor by name, as a view of the buffer."""
        start = 0
        for name, dtype, shape in zip(self.names, self.dtypes, self.shapes, strict=True):
            end = start + shape.numel() * dtype.itemsize
            yield name, self.flat[start:end].view(dtype).view(shape)
            start = end


Described = tuple[str, torch.dtype, torch.Size]
"""Name, dtype and shape of a tensor."""


def plan_buckets(described: Iterable[Described], size: int) -> list[Bucket]:
    """Divide tensors into buckets of at most `size` bytes, in order; a larger tensor gets its own bucket.

    A tensor that would not be aligned behind the one before it begins a new bucket, too.

    The buckets hold no memory yet. All processes plan the same buckets, so nothing about them needs to be exchanged.
    """
    planned: list[Bucket] = []
    filled_to = 0
    for name, dtype, shape in described:
        own = shape.numel() * dtype.itemsize
        if not planned or filled_to % dtype.itemsize or filled_to + own > size:
            planned.append(Bucket(torch.empty(0, dtype=torch.uint8)))
            filled_to = 0
        filled_to += own
        bucket = planned[-1]
        bucket.names.append(name)
        bucket.dtypes.append(dtype)
        bucket.shapes.append(shape)
    if planned:
        planned[-1].last = True
    return planned


def filled(
    planned: Sequence[Bucket],
    tensors: Iterable[tuple[str, Tensor]],
    buffers: Sequence[Tensor],
    before_each: Callable[[], None] = lambda: None,
) -> Iterator[Bucket]:
    """Copy tensors into planned buckets. Two buffers take turns, so one is filled while the other is sent.

    Args:
        planned: result of `plan_buckets`.
        tensors: the planned tensors by name. A tensor may be overwritten when the next one is requested.
        buffers: two buffers, uint8 [at least `largest_bytes`]; none on a process that holds no buckets.
        before_each: called before a bucket is filled. When it returns, the bucket before the previous one must be no
            longer in use.

    Yields:
        each bucket. Its memory is overwritten when the bucket after the next one is requested.
    """
    remaining = iter(tensors)
    for number, plan in enumerate(planned):
        before_each()
        flat = buffers[number % 2][: plan.nbytes] if buffers else plan.flat
        bucket = Bucket(flat, plan.names, plan.dtypes, plan.shapes, plan.last)
        places: Iterable[tuple[str, Tensor | None]] = bucket.tensors() if buffers else [(n, None) for n in plan.names]
        for name, place in places:
            found, tensor = next(remaining)
            if found != name:
                raise AssertionError(f"the export yields {found}, but {name} was planned")
            if place is not None:
                place.copy_(tensor)
        yield bucket
    for found, _ in remaining:
        raise AssertionError(f"the export yields {found}, which was not planned")


def largest_bytes(planned: Iterable[Bucket]) -> int:
    """Return the size of the largest of these buckets, in bytes."""
    return max((bucket.nbytes for bucket in planned), default=0)
