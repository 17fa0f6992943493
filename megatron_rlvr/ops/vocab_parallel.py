"""Vocabulary shards of tensor-parallel ranks, and the exchange of partial statistics between them."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class VocabShard:
    """The shard of the vocabulary that this process holds: shard ``rank`` of ``count``, each of ``width`` entries.

    The last shard is shorter if ``count`` does not divide the ``vocabulary``.
    """

    rank: int
    count: int
    width: int
    vocabulary: int

    @property
    def start(self) -> int:
        """The first entry of this shard."""
        return self.rank * self.width

    @classmethod
    def of(cls, group: dist.ProcessGroup | None, entries: int, vocabulary: int | None = None) -> VocabShard:
        """The shard of this process, which has ``entries`` of the vocabulary.

        ``group`` is the tensor-parallel group, None if the vocabulary is not sharded. ``vocabulary`` is the size of the
        whole vocabulary; None means that all shards have equal length. Raises ValueError if this process is not a
        member of the group, or if its shard of ``vocabulary`` must have another number of entries.
        """
        rank, count = 0, 1
        if group is not None:
            rank, count = dist.get_rank(group), dist.get_world_size(group)
        if rank < 0:
            raise ValueError(
                "group: this process (global rank "
                f"{dist.get_rank()}) is not one of its members; pass the tensor-parallel group this process belongs to"
            )
        if vocabulary is None:
            return cls(rank, count, entries, count * entries)
        width = -(-vocabulary // count)
        expected = min(width, vocabulary - rank * width)
        if entries != expected:
            raise ValueError(
                f"vocabulary: shard {rank} of {count} of {vocabulary} entries has {expected}, found {entries}; remove "
                "the padding"
            )
        return cls(rank, count, width, vocabulary)


def gather_partials(
    partials: Tensor, shard: VocabShard, group: dist.ProcessGroup | None, inverse_temperature: float
) -> Tensor:
    """Gather the partial statistics of all shards: float32 [T, K] to [W, T, K].

    Communication: one all-gather of K * T numbers, and none if the vocabulary is not sharded. Every rank then combines
    the shards in the same order, so every rank gets the same bits. On the CPU one more row carries each rank's shard
    width and temperature, and ranks that differ raise ValueError, all of them; on a GPU such a check would wait for the
    device. If ranks pass different numbers of tokens, the collective itself fails. ``MEGATRON_RLVR_CHECK=1`` in the
    environment compares them beforehand, on any device, with a collective of its own.
    """
    if shard.count == 1:
        return partials.unsqueeze(0)
    rows, columns = partials.shape
    traced = torch.compiler.is_compiling()
    checked = partials.device.type == "cpu" and not traced
    must_agree = (rows, shard.width, inverse_temperature)
    if not traced and os.environ.get("MEGATRON_RLVR_CHECK") == "1":
        of_rank = torch.tensor([must_agree], dtype=torch.float64, device=partials.device)
        of_all_ranks = of_rank.new_empty((shard.count, len(must_agree)))
        dist.all_gather_into_tensor(of_all_ranks, of_rank, group=group)
        _check_agreement(of_all_ranks)
    if checked:
        last = torch.zeros(1, columns)
        last[0, : len(must_agree)] = torch.tensor(must_agree)
        partials = torch.cat([partials, last])
    gathered = partials.new_empty((shard.count * partials.shape[0], columns))
    if checked:
        gathered.fill_(math.nan)  # rows that a rank with fewer tokens leaves unwritten must not look valid
    dist.all_gather_into_tensor(gathered, partials, group=group)
    gathered = gathered.view(shard.count, -1, columns)
    if checked:
        _check_agreement(gathered[:, rows, : len(must_agree)])
        gathered = gathered[:, :rows].contiguous()
    return gathered


def _check_agreement(of_all_ranks: Tensor) -> None:
    """Raise ValueError unless all ranks agree; ``of_all_ranks`` [W, 3] has their T, V/tp and 1 / temperature."""
    if not (of_all_ranks == of_all_ranks[0]).all():
        tokens, widths = (["?" if math.isnan(x) else int(x) for x in column.tolist()] for column in of_all_ranks.T[:2])
        raise ValueError(
            "group: its ranks must pass equal numbers of tokens, hold equal shards and pass one temperature; found T "
            f"{tokens}, V/tp {widths} and 1 / temperature {of_all_ranks[:, 2].tolist()}"
        )


def all_reduce_sum(tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Sum ``tensor`` over the group, in place: one all-reduce."""
    if group is not None and dist.get_world_size(group) > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM, group=group)
    return tensor
