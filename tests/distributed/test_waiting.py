"""Groups for processes that wait: what they exchange, their deadline. This file is also their program."""

from __future__ import annotations

import torch.distributed as dist

from megatron_rlvr.megatron import parallel, waiting
from megatron_rlvr.megatron.config import ParallelConfig
from tests.processes import fork
from tests.rendezvous import renew


def test_processes_that_wait() -> None:
    output = fork([__file__], 2).stdout
    for rank in (0, 1):
        assert f"rank {rank} agrees" in output
    late = "rank 0 waited for the start of a server: nothing arrived within parallel.wait_timeout_minutes=0.005"
    assert f"{late}\n" in output


def exchange(layout: parallel.Layout) -> None:
    """Every function gives every process what the others passed."""
    rank, default = layout.rank, dist.distributed_c10d._get_default_group()
    assert waiting.all_gather_over_job({"rank": rank}, "x") == [{"rank": 0}, {"rank": 1}]
    assert waiting.broadcast_from_main("main" if rank == 0 else None, "x") == "main"
    assert waiting.sum_over_job({"b": 2.0, "a": rank}, layout.is_leader, "x") == (
        {"a": 1.0, "b": 4.0} if layout.data_size == 2 else {"a": 0.0, "b": 2.0}
    )
    assert waiting.any_rank(rank == 1, "x") and not waiting.any_rank(False, "x")
    leader = 0 if layout.data_size == 1 else rank
    assert waiting.broadcast_from_leader(rank if layout.is_leader else None, "x") == leader
    if layout.is_leader:
        ranks = range(layout.data_size)
        assert waiting.all_gather_over_leaders([rank, 1], "x") == [[r, 1] for r in ranks]
        sent = [f"{rank} to {r}" for r in ranks]
        assert waiting.all_to_all_over_leaders(sent, "x") == [f"{r} to {rank}" for r in ranks]
    with waiting.as_default_group():
        assert dist.distributed_c10d._get_default_group() is waiting.job_group() is not default
    assert dist.distributed_c10d._get_default_group() is default


def main() -> None:
    for number, sizes in enumerate([{}, {"tensor": 2}, {"pipeline": 2}, {"context": 2}]):
        renew(number)
        with parallel.parallel_groups(ParallelConfig(**sizes), seed=0) as layout:
            exchange(layout)
    print(f"rank {layout.rank} agrees", flush=True)
    renew(4)
    with parallel.parallel_groups(ParallelConfig(wait_timeout_minutes=0.005), seed=0) as layout:
        if layout.rank == 0:
            try:
                waiting.barrier("the start of a server")
            except waiting.WaitError as error:
                print(error, flush=True)
            dist.distributed_c10d._get_default_store().set("waited", "1")
        dist.distributed_c10d._get_default_store().wait(["waited"])


if __name__ == "__main__":
    main()
