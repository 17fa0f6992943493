"""Microbatches: what one forward pass sees of a rollout, padded or packed, and cut for a context-parallel rank."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from megatron_rlvr.data.batch import RolloutBatch


@dataclass(frozen=True)
class MicrobatchConfig:
    """How a minibatch is cut into microbatches.

    Attributes:
        sequences: most sequences of a microbatch, padded on the right to one width; 0 takes all.
        tokens: most tokens of a microbatch, its sequences packed one behind the other; 0 pads instead.
        width_multiple: the width is a multiple of this: sequence parallelism splits it over tensor-parallel ranks.
        context_size, context_rank: of the context-parallel group, which splits every sequence.
        mark_padding: say which tokens are padding, to a router that balances its experts.
    """

    sequences: int = 0
    tokens: int = 0
    width_multiple: int = 1
    context_size: int = 1
    context_rank: int = 0
    mark_padding: bool = False

    @property
    def unit(self) -> int:
        """The length of a sequence is a multiple of this."""
        return 2 * self.context_size if self.context_size > 1 else 1


@dataclass
class Microbatch:
    """Sequences of one forward pass: b of one width, or, packed, one row of all of them.

    Attributes:
        tokens: int64 [b, s] of this context-parallel rank; s is the whole width without context parallelism.
        rows: int64 [R], ``position * b + sequence`` in `tokens` of those that predict a response token.
        targets: int64 [T], the response tokens, whichever rank predicts them, sequence by sequence.
        flat: int64 [T], where each of them stands in the rank's flat token arrays (`RolloutBatch.rollout_logprob` ...).
        sequence_index: int64 [T], the index in `sequences` of the sequence of each token.
        sequences: int64 [n], which of the rank's sequences these are.
        here: int64 [R], the targets that this context-parallel rank predicts; None means all.
        positions: int64 [s], where the tokens stand in their sequences; None means 0 .. s-1.
        boundaries: int32 [n + 1], where the packed sequences begin and end in the whole width; None if padded.
        padding: bool [b, s], which tokens are none; None unless asked for.
    """

    tokens: Tensor
    rows: Tensor
    targets: Tensor
    flat: Tensor
    sequence_index: Tensor
    sequences: Tensor
    here: Tensor | None = None
    positions: Tensor | None = None
    boundaries: Tensor | None = None
    padding: Tensor | None = None


def zigzag(boundaries: Sequence[int], size: int, rank: int) -> Tensor:
    """The positions that a context-parallel rank holds, in its order: int64 [boundaries[-1] / size].

    Every segment between two boundaries is cut into 2 x size chunks, of which rank r holds chunks r and 2 size - 1 - r:
    all ranks have an equal share of the causal triangle. megatron-core's and Transformer Engine's order.
    """
    found = []
    for start, end in pairwise(boundaries):
        chunk = (end - start) // (2 * size)
        for number in (rank, 2 * size - 1 - rank):
            found.append(torch.arange(start + number * chunk, start + (number + 1) * chunk))
    return torch.cat(found)


def partition(batch: RolloutBatch, sequences: Tensor, config: MicrobatchConfig, at_least: int = 1) -> list[Tensor]:
    """Share `sequences` (int64 [n]) out to microbatches, int64 [m] each; empty ones fill up to `at_least`.

    Sequences of like length share a padded microbatch, so that little of it is padding. Packed microbatches are
    balanced: the longest sequence left goes to the emptiest one, as many as the budget takes.
    """
    exact = (batch.prompt_lengths + batch.response_lengths)[sequences]
    if not config.tokens:
        count = max(at_least, -(-len(sequences) // (config.sequences or max(1, len(sequences)))))
        if count == 1:
            return [sequences]
        ordered = sequences[exact.argsort(descending=True, stable=True)]
        return list(ordered.tensor_split(count) if count == at_least else ordered.split(config.sequences))
    lengths: list[int] = (-(-exact // config.unit) * config.unit).tolist()
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


def microbatch(batch: RolloutBatch, sequences: Tensor, config: MicrobatchConfig) -> Microbatch:
    """The microbatch of `sequences` (int64 [n]; none gives one of padding, which predicts nothing)."""
    prompt, response = batch.prompt_lengths[sequences], batch.response_lengths[sequences]
    lengths = prompt + response
    width = int(lengths.max()) if len(sequences) else 1
    tokens = batch.tokens[sequences, :width]
    position = torch.arange(width)
    first = prompt[:, None] - 1  # the last prompt token predicts the first response token
    sequence, at = ((position >= first) & (position < first + response[:, None])).nonzero(as_tuple=True)
    found = Microbatch(
        tokens=tokens,
        rows=at * len(sequences) + sequence,
        targets=tokens[sequence, at + 1],
        flat=batch.offsets[sequences][sequence] + at - first[sequence, 0],
        sequence_index=sequence,
        sequences=sequences,
    )
    whole = config.unit * config.width_multiple
    real = position < lengths[:, None]
    if not len(sequences):
        found.tokens = torch.zeros(1, width, dtype=torch.int64)
    if config.tokens:
        padded = -(-lengths // config.unit) * config.unit if len(sequences) else torch.ones(1, dtype=torch.int64)
        padded[-1] += -int(padded.sum()) % whole
        ends = padded.cumsum(0)
        starts = ends - padded
        found.tokens = torch.zeros(1, int(ends[-1]), dtype=torch.int64)
        row, column = real.nonzero(as_tuple=True)
        found.tokens[0, starts[row] + column] = tokens[row, column]
        found.rows = starts[sequence] + at
        found.boundaries = torch.cat([starts[:1], ends]).int()
    elif found.tokens.size(1) % whole:
        found.tokens = torch.nn.functional.pad(found.tokens, (0, -found.tokens.size(1) % whole))
    if config.mark_padding:
        found.padding = torch.ones_like(found.tokens, dtype=torch.bool)
        if config.tokens:
            found.padding[0, starts[row] + column] = False
        else:
            found.padding[: len(real), :width] = ~real
    if config.context_size > 1:
        _keep_own_part(found, config)
    return found


def _keep_own_part(part: Microbatch, config: MicrobatchConfig) -> None:
    """Leave of the tokens and rows those of this context-parallel rank."""
    count, width = part.tokens.shape
    own = zigzag(
        [0, width] if part.boundaries is None else part.boundaries.tolist(), config.context_size, config.context_rank
    )
    local = torch.full((width,), -1)
    local[own] = torch.arange(len(own))
    at, sequence = part.rows // count, part.rows % count
    part.here = (local[at] >= 0).nonzero()[:, 0]
    part.rows = (local[at] * count + sequence)[part.here]
    part.tokens = part.tokens[:, own]
    if part.padding is not None:
        part.padding = part.padding[:, own]
    part.positions = own if part.boundaries is None else None
