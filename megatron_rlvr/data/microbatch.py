"""Microbatches: the sequences of one forward pass, padded or packed, and split over context-parallel ranks."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from megatron_rlvr.data.batch import RolloutBatch
from megatron_rlvr.data.routes import MicrobatchRoutes
from megatron_rlvr.ops import KeptSets


@dataclass(frozen=True)
class MicrobatchConfig:
    """How a minibatch is split into microbatches.

    Attributes:
        sequences: maximum number of sequences per microbatch, padded on the right to one width; 0 takes all of them.
        tokens: maximum number of tokens per microbatch, whose sequences are packed into one row; 0 pads instead.
        width_multiple: pad the width to a multiple of this, so that sequence parallelism, for example, can split it.
        width_step: pad the width further, to a multiple of this. Transformer Engine's attention builds a plan for every
            width that occurs, so few of them should.
        context_size, context_rank: size of the context-parallel group, which splits every sequence, and rank in it.
        mark_padding: also return which tokens are padding, for a router that balances its experts.
    """

    sequences: int = 0
    tokens: int = 0
    width_multiple: int = 1
    context_size: int = 1
    context_rank: int = 0
    mark_padding: bool = False
    width_step: int = 1

    @property
    def length_multiple(self) -> int:
        """The length of every sequence is padded to a multiple of this, so that `zigzag` can split it."""
        return 2 * self.context_size if self.context_size > 1 else 1

    @property
    def whole_width_multiple(self) -> int:
        """The width of a microbatch, before context-parallel ranks split it, is padded to a multiple of this."""
        return math.lcm(self.length_multiple * self.width_multiple, self.width_step)


@dataclass
class Microbatch:
    """The sequences of one forward pass: b of them padded to one width, or all of them packed into one row (b = 1).

    A *predictor* is a position whose output predicts a response token. Only predictors reach the vocabulary projection.

    Attributes:
        tokens: int64 [b, s], of this context-parallel rank; without context parallelism, s is the full width.
        rows: int64 [R], the predictors of this rank, as ``position * b + sequence`` in `tokens`.
        targets: int64 [T], the response tokens of all context-parallel ranks, sequence by sequence.
        token_index: int64 [T], the index of each target in the rank's flat token arrays, such as
            `RolloutBatch.rollout_logprob`.
        sequence_index: int64 [T], the index in `sequences` of the sequence of each target.
        sequences: int64 [n], indices of the sequences in the rank's batch.
        local_targets: int64 [R], indices of the targets that this context-parallel rank predicts; None means all.
        positions: int64 [s], the positions of the tokens in their sequences; None means 0 .. s-1.
        boundaries: int32 [n + 1], where the packed sequences begin and end in the full width; None if padded.
        longest: an upper bound of the lengths of packed sequences; None if padded.
        padding: bool [b, s], which tokens are padding; None unless `MicrobatchConfig.mark_padding` is set.
        kept: kept sets of the R targets that this rank predicts; None if the policy is not restricted to kept sets.
        routes: routes of the tokens of this rank, to be replayed; None if the routers choose all experts.
    """

    tokens: Tensor
    rows: Tensor
    targets: Tensor
    token_index: Tensor
    sequence_index: Tensor
    sequences: Tensor
    local_targets: Tensor | None = None
    positions: Tensor | None = None
    boundaries: Tensor | None = None
    padding: Tensor | None = None
    longest: int | None = None
    kept: KeptSets | None = None
    routes: MicrobatchRoutes | None = None


def zigzag(boundaries: Sequence[int], size: int, rank: int) -> Tensor:
    """Return the positions that a context-parallel rank holds, in its order: int64 [boundaries[-1] / size].

    Every segment between two boundaries is split into 2 x size chunks. Rank r holds chunks r and 2 x size - 1 - r, so
    that all ranks have the same share of the causal triangle. megatron-core and Transformer Engine use this order.

    Args:
        boundaries: where the sequences begin and end; every length is a multiple of 2 x size.
        size, rank: size of the context-parallel group, and rank in it.
    """
    positions = []
    for start, end in pairwise(boundaries):
        chunk = (end - start) // (2 * size)
        for number in (rank, 2 * size - 1 - rank):
            positions.append(torch.arange(start + number * chunk, start + (number + 1) * chunk))
    return torch.cat(positions)


def partition(batch: RolloutBatch, sequences: Tensor, config: MicrobatchConfig, at_least: int = 1) -> list[Tensor]:
    """Assign sequences to microbatches.

    Padded microbatches hold sequences of similar length, so that they contain little padding. Packed microbatches are
    balanced: the longest remaining sequence goes to the emptiest microbatch, and there are as many microbatches as the
    limit on tokens requires.

    Args:
        batch: this rank's rollouts.
        sequences: int64 [n], indices in the batch.
        config: limits of a microbatch.
        at_least: return at least this many microbatches; some may be empty.

    Returns:
        the sequences of each microbatch, int64 [m] each.
    """
    exact_lengths = (batch.prompt_lengths + batch.response_lengths)[sequences]
    if not config.tokens:
        count = max(at_least, -(-len(sequences) // (config.sequences or max(1, len(sequences)))))
        if count == 1:
            return [sequences]
        ordered = sequences[exact_lengths.argsort(descending=True, stable=True)]
        return list(ordered.tensor_split(count) if count == at_least else ordered.split(config.sequences))
    lengths: list[int] = _round_up(exact_lengths, config.length_multiple).tolist()
    count = max(at_least, -(-sum(lengths) // config.tokens))
    while True:
        loads = [(0, number) for number in range(count)]
        members: list[list[int]] = [[] for _ in range(count)]
        for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
            load, number = heapq.heappop(loads)
            members[number].append(index)
            heapq.heappush(loads, (load + lengths[index], number))
        if max(loads)[0] <= config.tokens or count >= len(lengths):
            return [sequences[sorted(chosen)] for chosen in members]
        count += 1


def build_microbatch(batch: RolloutBatch, sequences: Tensor, config: MicrobatchConfig) -> Microbatch:
    """Build the microbatch of `sequences`, int64 [n].

    A microbatch without sequences consists of padding and predicts nothing.
    """
    prompt, response = batch.prompt_lengths[sequences], batch.response_lengths[sequences]
    lengths = prompt + response
    width = int(lengths.max()) if len(sequences) else 1
    tokens = batch.tokens[sequences, :width]
    column = torch.arange(width)
    first = prompt[:, None] - 1  # the last prompt token predicts the first response token
    sequence, position = ((column >= first) & (column < first + response[:, None])).nonzero(as_tuple=True)
    microbatch = Microbatch(
        tokens=tokens if len(sequences) else torch.zeros(1, width, dtype=torch.int64),
        rows=position * len(sequences) + sequence,
        targets=tokens[sequence, position + 1],
        token_index=batch.offsets[sequences][sequence] + position - first[sequence, 0],
        sequence_index=sequence,
        sequences=sequences,
    )
    if batch.routes is not None:
        rows = batch.routes.rows_of(sequences, width) if len(sequences) else torch.full((1, width), -1)
        microbatch.routes = MicrobatchRoutes(batch.routes, rows)
    is_token = column < lengths[:, None]
    if config.tokens:
        _pack(microbatch, lengths, position, is_token, config)
    else:
        _pad(microbatch, is_token, config)
    if config.context_size > 1:
        _keep_local_positions(microbatch, config)
    if batch.kept is not None:
        index, local = microbatch.token_index, microbatch.local_targets
        microbatch.kept = batch.kept.select(index if local is None else index[local])
    return microbatch


def _pad(microbatch: Microbatch, is_token: Tensor, config: MicrobatchConfig) -> None:
    """Pad the rows on the right; `is_token`, bool [n, width], marks the tokens that are not padding already."""
    rows, width = is_token.shape
    extra_columns = -microbatch.tokens.size(1) % config.whole_width_multiple
    if extra_columns:
        microbatch.tokens = torch.nn.functional.pad(microbatch.tokens, (0, extra_columns))
        if microbatch.routes is not None:
            microbatch.routes.rows = torch.nn.functional.pad(microbatch.routes.rows, (0, extra_columns), value=-1)
    if config.mark_padding:
        microbatch.padding = torch.ones_like(microbatch.tokens, dtype=torch.bool)
        microbatch.padding[:rows, :width] = ~is_token


def _pack(
    microbatch: Microbatch, lengths: Tensor, position: Tensor, is_token: Tensor, config: MicrobatchConfig
) -> None:
    """Put the sequences into one row, one after the other; the last one is padded to the multiple of the width.

    Args:
        microbatch: changed in place.
        lengths: int64 [n], lengths of the sequences.
        position: int64 [T], position of each target's predictor in its sequence.
        is_token: bool [n, width], which tokens are not padding.
        config: multiples of lengths and width.
    """
    padded = _round_up(lengths, config.length_multiple) if len(lengths) else torch.ones(1, dtype=torch.int64)
    padded[-1] += -int(padded.sum()) % config.whole_width_multiple
    ends = padded.cumsum(0)
    starts = ends - padded
    sequence, column = is_token.nonzero(as_tuple=True)
    packed = torch.zeros(1, int(ends[-1]), dtype=torch.int64)
    packed[0, starts[sequence] + column] = microbatch.tokens[sequence, column]
    if microbatch.routes is not None:
        rows = torch.full_like(packed, -1)
        rows[0, starts[sequence] + column] = microbatch.routes.rows[sequence, column]
        microbatch.routes.rows = rows
    microbatch.tokens = packed
    microbatch.rows = starts[microbatch.sequence_index] + position
    microbatch.boundaries = torch.cat([starts[:1], ends]).int()
    microbatch.longest = int(_round_up(padded.max(), config.width_step))
    if config.mark_padding:
        microbatch.padding = torch.ones_like(packed, dtype=torch.bool)
        microbatch.padding[0, starts[sequence] + column] = False


def _keep_local_positions(microbatch: Microbatch, config: MicrobatchConfig) -> None:
    """Remove the tokens and predictors of other context-parallel ranks."""
    b, width = microbatch.tokens.shape
    boundaries = [0, width] if microbatch.boundaries is None else microbatch.boundaries.tolist()
    local_positions = zigzag(boundaries, config.context_size, config.context_rank)
    local_column = torch.full((width,), -1)  # the column of each position on this rank; -1 on another rank
    local_column[local_positions] = torch.arange(len(local_positions))
    position, sequence = microbatch.rows // b, microbatch.rows % b
    microbatch.local_targets = (local_column[position] >= 0).nonzero()[:, 0]
    microbatch.rows = (local_column[position] * b + sequence)[microbatch.local_targets]
    microbatch.tokens = microbatch.tokens[:, local_positions]
    if microbatch.padding is not None:
        microbatch.padding = microbatch.padding[:, local_positions]
    if microbatch.routes is not None:
        microbatch.routes.rows = microbatch.routes.rows[:, local_positions]
    microbatch.positions = local_positions if microbatch.boundaries is None else None


def _round_up(lengths: Tensor, multiple: int) -> Tensor:
    return -(-lengths // multiple) * multiple
