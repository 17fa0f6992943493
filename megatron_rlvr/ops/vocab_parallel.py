"""How tensor-parallel ranks, each with one shard of the vocabulary, share the partials of their rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class VocabShard:
    """Which shard of the vocabulary this process holds: shard ``rank`` of ``count`` equal ones."""

    rank: int
    count: int

    @classmethod
    def of(cls, group: dist.ProcessGroup | None) -> VocabShard:
        """The shard of this process in a tensor-parallel ``group``; None means that the vocabulary is whole here.

        Raises ValueError when this process is not a member of the group.
        """
        if group is None:
            return cls(0, 1)
        rank = dist.get_rank(group)
        if rank < 0:
            raise ValueError(
                "group: this process (global rank "
                f"{dist.get_rank()}) is not one of its members; pass the tensor-parallel group this process belongs to"
            )
        return cls(rank, dist.get_world_size(group))


def gather_partials(partials: Tensor, shard: VocabShard, group: dist.ProcessGroup | None) -> Tensor:
    """All shards' partials: float32 [T, K] to [W, T, K].

    One all-gather of K * T numbers; none when the vocabulary is whole. Every rank then combines all shards in the
    same order, so the results are the same bits on every rank.
    """
    if shard.count == 1:
        return partials.unsqueeze(0)
    gathered = partials.new_empty((shard.count * partials.shape[0], partials.shape[1]))
    dist.all_gather_into_tensor(gathered, partials, group=group)
    return gathered.view(shard.count, *partials.shape)


def all_reduce_sum(tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Sum ``tensor`` over the group, in place: one all-reduce."""
    if VocabShard.of(group).count > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM, group=group)
    return tensor
