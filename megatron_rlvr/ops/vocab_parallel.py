"""How tensor-parallel ranks, each with one shard of the vocabulary, share the partials of their rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class VocabShard:
    """Which shard of the vocabulary this process holds: shard ``rank`` of ``count``, each of ``width`` entries.

    The last shard is shorter where ``count`` does not divide the ``vocabulary``.
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
        """The shard of ``entries`` of this process in a tensor-parallel ``group``; None: the vocabulary is whole here.

        Raises ValueError when this process is not a member of the group, or its shard of the ``vocabulary`` has not as
        many entries.
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
                f"vocabulary: shard {rank} of {count} of {vocabulary} entries has {expected}, found {entries}; cut off "
                "what pads it"
            )
        return cls(rank, count, width, vocabulary)


def gather_partials(
    partials: Tensor, shard: VocabShard, group: dist.ProcessGroup | None, inverse_temperature: float
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
        holds[0, 0], holds[0, 1] = shard.width, inverse_temperature
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
    if group is not None and dist.get_world_size(group) > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM, group=group)
    return tensor
