"""Kept sets: the tokens to which the softmax of each row is restricted, as a top-p or top-k cut leaves them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import reference
from .library import define


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
        row = torch.repeat_interleave(torch.arange(len(counts), device=ids.device), counts)
        key, _ = ((row << 32) + ids.long()).sort()
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
        counts = self.offsets[1:] - self.offsets[:-1]
        row = torch.repeat_interleave(torch.arange(len(self), device=self.ids.device), counts)
        column = self.ids[self.offsets[0] : self.offsets[-1]].long() - start
        inside = (column >= 0) & (column < width)
        mask = torch.zeros(len(self), width, dtype=torch.bool, device=self.ids.device)
        mask[row[inside], column[inside]] = True
        return mask


def check_kept(kept: KeptSets, targets: Tensor) -> None:
    """Raise ValueError unless `kept` has the shapes, types and device of sets for rows with these targets.

    The operators read the values, on the CPU.
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


def _check_values(kept: KeptSets, targets: Tensor, vocabulary: int) -> None:
    """Raise ValueError for a set that is empty, not ascending, outside the vocabulary or without its row's target."""
    counts = kept.offsets.diff()
    if not len(counts):
        return
    first, last = int(kept.offsets[0]), int(kept.offsets[-1])
    if first < 0 or last > len(kept.ids) or bool((counts < 1).any()):
        raise ValueError(f"kept: offsets must rise by at least 1 per row, from 0 to at most {len(kept.ids)}")
    ids = kept.ids[first:last].long()
    row = torch.repeat_interleave(torch.arange(len(counts), device=ids.device), counts)
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


def _masked(logits: Tensor, kept_ids: Tensor, kept_offsets: Tensor, vocab_start: int) -> Tensor:
    is_kept = KeptSets(kept_ids, kept_offsets).mask(vocab_start, logits.shape[1])
    return logits.masked_fill(~is_kept, -torch.inf)


def _eager_row_statistics(
    logits: Tensor, targets: Tensor, kept_ids: Tensor, kept_offsets: Tensor, vocab_start: int, *settings: Any
) -> Tensor:
    if logits.device.type == "cpu":
        _check_values(KeptSets(kept_ids, kept_offsets), targets, settings[0])
    masked = _masked(logits, kept_ids, kept_offsets, vocab_start)
    partials = reference.row_statistics(masked, targets, vocab_start, *settings)
    is_kept = KeptSets(kept_ids, kept_offsets).mask(vocab_start, logits.shape[1])
    column = targets - vocab_start
    inside = (targets >= 0) & (column >= 0) & (column < logits.shape[1])
    found = is_kept.gather(-1, column.clamp(0, logits.shape[1] - 1).unsqueeze(-1)).squeeze(-1)
    broken = inside & ~found
    partials[:, reference.MAXIMUM].masked_fill_(broken, torch.nan)
    return partials


def _eager_gradient(
    logits: Tensor,
    targets: Tensor,
    kept_ids: Tensor,
    kept_offsets: Tensor,
    state: Tensor,
    grad_logprob: Tensor,
    grad_entropy: Tensor,
    vocab_start: int,
    inverse_temperature: float,
) -> Tensor:
    masked = _masked(logits, kept_ids, kept_offsets, vocab_start)
    return reference.logits_gradient(
        masked, targets, state, grad_logprob, grad_entropy, vocab_start, inverse_temperature
    )


def _eager_gradient_in_place(logits: Tensor, *arguments: Any) -> None:
    logits.copy_(_eager_gradient(logits, *arguments))


def _eager_token_statistics(
    logits: Tensor,
    targets: Tensor,
    kept_ids: Tensor,
    kept_offsets: Tensor,
    gathered: Tensor,
    vocab_start: int,
    vocab_size: int,
    inverse_temperature: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.ops.megatron_rlvr.combine_statistics(gathered, targets, vocab_size, inverse_temperature)


def _fake_row_statistics(logits: Tensor, *arguments: Any) -> Tensor:
    return logits.new_empty((logits.shape[0], 6 if arguments[-1] else 4), dtype=torch.float32)


def _fake_token_statistics(
    logits: Tensor, targets: Tensor, kept_ids: Tensor, kept_offsets: Tensor, gathered: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = gathered.shape[1]
    shapes = ((rows,), (rows,), (rows, 4), (2 if gathered.shape[2] == 6 else 0, rows))
    logprob, entropy, state, moments = (gathered.new_empty(shape) for shape in shapes)
    return logprob, entropy, state, moments


def _save_for_gradient(ctx: Any, inputs: tuple, output: tuple) -> None:
    logits, targets, kept_ids, kept_offsets, _, ctx.vocab_start, _, ctx.inverse_temperature = inputs
    _, _, state, moments = output
    ctx.save_for_backward(logits, targets, kept_ids, kept_offsets, state)
    ctx.mark_non_differentiable(state, moments)


def _statistics_backward(ctx: Any, grad_logprob: Tensor, grad_entropy: Tensor, *_: Any) -> tuple:
    gradient = torch.ops.megatron_rlvr.kept_logits_gradient(
        *ctx.saved_tensors,
        grad_logprob.contiguous(),
        grad_entropy.contiguous(),
        ctx.vocab_start,
        ctx.inverse_temperature,
    )
    return gradient, *([None] * 7)


_KEPT = "Tensor targets, Tensor kept_ids, Tensor kept_offsets"
_GRADIENT_ARGUMENTS = (
    f"{_KEPT}, Tensor state, Tensor grad_logprob, Tensor grad_entropy, int vocab_start, float inverse_temperature"
)
define(
    f"kept_row_statistics(Tensor logits, {_KEPT}, int vocab_start, int vocab_size, float inverse_temperature,"
    " bool second_moments) -> Tensor",
    eager=_eager_row_statistics,
    fake=_fake_row_statistics,
)
# combine_statistics with the logits as an argument, so that autograd can differentiate with respect to them.
define(
    f"kept_token_statistics(Tensor logits, {_KEPT}, Tensor gathered, int vocab_start, int vocab_size,"
    " float inverse_temperature) -> (Tensor logprob, Tensor entropy, Tensor state, Tensor moments)",
    eager=_eager_token_statistics,
    fake=_fake_token_statistics,
    backward=_statistics_backward,
    setup_context=_save_for_gradient,
    has_kernel=False,
)
define(
    f"kept_logits_gradient(Tensor logits, {_GRADIENT_ARGUMENTS}) -> Tensor",
    eager=_eager_gradient,
    fake=lambda logits, *_: torch.empty_like(logits),
)
define(
    f"kept_logits_gradient_(Tensor(a!) logits, {_GRADIENT_ARGUMENTS}) -> ()",
    eager=_eager_gradient_in_place,
    fake=lambda *_: None,
)
