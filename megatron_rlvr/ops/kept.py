"""Kept sets: the tokens to which the softmax of each row is restricted, as a top-p or top-k cut leaves them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class KeptSets:
    """The ids that each of T rows keeps: all others have probability 0, and gradient 0 with respect to their logits.

    A policy that samples under top-p or top-k is the softmax over the kept ids alone. Its sets belong to the sampler:
    other weights would keep other ids, so they cannot be computed again from the logits, and a threshold on the logits
    would not reproduce them. A list of ids takes 4 bytes per kept id, where a bit per logit would take 19 kB per row of
    152,000.

    Attributes:
        ids: int32 [K], ids of the whole vocabulary, row after row, strictly ascending in each row.
        offsets: int64 [T + 1]; row t keeps ids[offsets[t]:offsets[t + 1]]. From 0 to K, and no row is empty.
    """

    ids: Tensor
    offsets: Tensor

    @classmethod
    def of(cls, counts: Tensor, ids: Tensor) -> KeptSets:
        """The sets of rows with `counts` ids each, int [T]; the ids of a row may come in any order."""
        counts = counts.long()
        key, _ = ((_rows_of(counts) << 32) + ids.long()).sort()
        return cls((key & 0xFFFFFFFF).int(), torch.cat([counts.new_zeros(1), counts.cumsum(0)]))

    def __len__(self) -> int:
        return self.offsets.shape[0] - 1

    def to(self, device: torch.device) -> KeptSets:
        """The same sets on another device."""
        return KeptSets(self.ids.to(device), self.offsets.to(device))

    def rows(self, chunk: slice) -> KeptSets:
        """The sets of consecutive rows; shares the memory of the ids."""
        return KeptSets(self.ids, self.offsets[chunk.start : chunk.stop + 1])

    def select(self, index: Tensor) -> KeptSets:
        """The sets of the rows `index`, int64 [n], in its order."""
        start = self.offsets[index]
        counts = self.offsets[index + 1] - start
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        within = torch.arange(int(offsets[-1]), device=offsets.device) - torch.repeat_interleave(offsets[:-1], counts)
        return KeptSets(self.ids[torch.repeat_interleave(start, counts) + within], offsets)

    def mask(self, start: int, width: int) -> Tensor:
        """bool [T, width], whether each of the ids start .. start + width - 1 is kept."""
        counts = self.offsets.diff()
        row = _rows_of(counts)
        column = self.ids[self.offsets[0] : self.offsets[-1]].long() - start
        inside = (column >= 0) & (column < width)
        mask = torch.zeros(len(self), width, dtype=torch.bool, device=self.ids.device)
        mask[row[inside], column[inside]] = True
        return mask


def _rows_of(counts: Tensor) -> Tensor:
    """The row of each id, int64 [K], of rows with `counts` ids."""
    return torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)


def check_kept(kept: KeptSets, targets: Tensor) -> None:
    """Raise ValueError unless `kept` has the shapes, types and device of sets for rows with these targets.

    The operators check the values, on the CPU (`check_values`).
    """
    if kept.ids.dtype != torch.int32 or kept.ids.dim() != 1 or kept.offsets.dtype != torch.int64:
        raise ValueError(
            f"kept: ids must be int32 [K] and offsets int64 [T + 1], found {kept.ids.dtype} {list(kept.ids.shape)} and "
            f"{kept.offsets.dtype} {list(kept.offsets.shape)}"
        )
    if kept.offsets.shape != (targets.shape[0] + 1,):
        raise ValueError(f"kept: offsets must be [{targets.shape[0] + 1}], found {list(kept.offsets.shape)}")
    if not kept.ids.device == kept.offsets.device == targets.device:
        raise ValueError(
            f"kept: ids and offsets must be on the targets' device {targets.device}, found {kept.ids.device} and "
            f"{kept.offsets.device}"
        )


def check_values(kept: KeptSets, targets: Tensor, vocabulary: int) -> None:
    """Raise ValueError for a set that is empty, not ascending, outside the vocabulary or without its row's target."""
    counts = kept.offsets.diff()
    if not len(counts):
        return
    first, last = int(kept.offsets[0]), int(kept.offsets[-1])
    if first < 0 or last > len(kept.ids) or bool((counts < 1).any()):
        raise ValueError(f"kept: offsets must rise by at least 1 per row, from 0 to at most {len(kept.ids)}")
    ids = kept.ids[first:last].long()
    row = _rows_of(counts)
    if bool((((row << 32) + ids).diff() <= 0).any()):
        raise ValueError("kept: the ids of a row must ascend strictly; KeptSets.of sorts them")
    if bool(((ids < 0) | (ids >= vocabulary)).any()):
        raise ValueError(f"kept: ids must be in [0, {vocabulary}), found {int(ids.min())} to {int(ids.max())}")
    found = torch.zeros(len(counts), dtype=torch.bool, device=ids.device).index_put_(
        (row,), ids == targets[row], accumulate=True
    )
    missing = (targets >= 0) & ~found
    if bool(missing.any()):
        example = int(missing.nonzero()[0])
        raise ValueError(
            f"kept: the target of row {example}, {int(targets[example])}, is not in its kept set: it cannot have been "
            "drawn from it"
        )
