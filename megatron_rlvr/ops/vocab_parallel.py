"""How tensor-parallel ranks, each with one shard of the vocabulary, share the partials of their rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
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


def gather_partials(
    partials: Tensor, shard: VocabShard, group: dist.ProcessGroup | None, width: int, inverse_temperature: float
) -> Tensor:
    """All shards' partials: float32 [T, K] to [W, T, K].

    One all-gather of K * T numbers; none when the vocabulary is whole. Every rank then combines all shards in the
    same order, so the results are the same bits on every rank. On the CPU one more row says what each rank holds, and
    unequal shards or temperatures raise ValueError on all ranks; on a device a check would wait for it.
    """
    if shard.count == 1:
        return partials.unsqueeze(0)
    rows, columns = partials.shape
    checked = partials.device.type == "cpu" and not torch.compiler.is_compiling()
    if checked:
        holds = torch.zeros(1, columns)
        holds[0, 0], holds[0, 1] = width, inverse_temperature
        partials = torch.cat([partials, holds])
    gathered = partials.new_empty((shard.count * partials.shape[0], columns))
    dist.all_gather_into_tensor(gathered, partials, group=group)
    gathered = gathered.view(shard.count, -1, columns)
    if checked:
        everyone = gathered[:, rows, :2]
        if not (everyone == everyone[0]).all():
            raise ValueError(
                "group: its ranks must hold equal shards and pass one temperature; found V/tp "
                f"{everyone[:, 0].long().tolist()} and 1 / temperature {everyone[:, 1].tolist()}"
            )
        gathered = gathered[:, :rows].contiguous()
    return gathered


def all_reduce_sum(tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Sum ``tensor`` over the group, in place: one all-reduce."""
    if VocabShard.of(group).count > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM, group=group)
    return tensor
