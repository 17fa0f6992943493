"""Collectives for processes that wait for servers, verifiers or disks, or for a process that does.

They exchange host memory over gloo, in process groups that no computation uses, with a deadline of their own
(``parallel.wait_timeout_minutes``). In a collective of the default group, a GPU would run an NCCL kernel as long as it
waits: servers on the same GPU would lose its multiprocessors, and after ``parallel.timeout_minutes`` NCCL's watchdog
would end the job. So every process waits here until all of them can continue, before they enter a collective of
`collectives`.

Each function takes `what`: what this process waits for, as the error says it. Each docstring names the processes that
must call the function together and the messages that it sends. A job of one process sends none.
"""

from __future__ import annotations

import datetime
import pickle
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from megatron_rlvr.errors import first_line

T = TypeVar("T")


class WaitError(RuntimeError):
    """What a process waited for did not happen: the deadline passed, or another process ended."""


@dataclass(frozen=True)
class _Groups:
    """The groups of this process, and their deadline.

    Attributes:
        job: all processes.
        replica: the processes of this data-parallel rank; None if there is one.
        leader: rank in the job of the leader of this data-parallel rank.
        leaders: the leaders of all data-parallel ranks, in their order; None on other processes, and if there is one.
        minutes: the deadline of a collective.
    """

    job: dist.ProcessGroup
    replica: dist.ProcessGroup | None
    leader: int
    leaders: dist.ProcessGroup | None
    minutes: float


_groups: _Groups | None = None


@contextmanager
def waiting_groups(data_rank: int, is_leader: bool, minutes: float) -> Iterator[None]:
    """Create the groups for the duration of the block. Collective over the job.

    Args:
        data_rank: data-parallel rank of this process.
        is_leader: whether this process is the leader of its data-parallel rank.
        minutes: the longest that a collective waits.
    """
    global _groups
    if dist.get_world_size() > 1:
        _groups = _create(data_rank, is_leader, minutes)
    try:
        yield
    finally:
        _groups = None


def _create(data_rank: int, is_leader: bool, minutes: float) -> _Groups:
    timeout = datetime.timedelta(minutes=minutes)
    job = dist.new_group(timeout=timeout, backend="gloo", group_desc="waiting-job")
    places: list[tuple[int, bool]] = [(0, False)] * dist.get_world_size()
    dist.all_gather_object(places, (data_rank, is_leader), group=job)
    leaders = [rank for rank, (_, leads) in enumerate(places) if leads]  # torch orders the members of a group by rank
    assert [places[rank][0] for rank in leaders] == list(range(len(leaders))), "data-parallel ranks in another order"
    replicas = [
        _group([rank for rank, (other, _) in enumerate(places) if other == number], "replica", timeout)
        for number in range(len(leaders))
    ]
    return _Groups(job, replicas[data_rank], leaders[data_rank], _group(leaders, "leaders", timeout), minutes)


def _group(ranks: Sequence[int], name: str, timeout: datetime.timedelta) -> dist.ProcessGroup | None:
    """See `new_group`."""
    if len(ranks) == 1:
        return None
    group = dist.new_group(ranks, timeout, backend="gloo", group_desc=f"waiting-{name}")
    return group if dist.get_rank() in ranks else None


def job_group() -> dist.ProcessGroup | None:
    """Return the group of all processes, for a library that takes one; None, the default group, if there is one."""
    return _groups.job if _groups else None


@contextmanager
def as_default_group() -> Iterator[None]:
    """Make the group of all processes the default group, for a library that exchanges Python objects while it waits.

    The block must not communicate tensors of a GPU in the default group.
    """
    if _groups is None:
        yield
        return
    original = distributed_c10d._get_default_group()
    distributed_c10d._update_default_pg(_groups.job)
    try:
        yield
    finally:
        distributed_c10d._update_default_pg(original)


def new_group(ranks: Sequence[int], name: str) -> dist.ProcessGroup | None:
    """Create a group of some processes that wait for each other. Collective over the job.

    Returns:
        the group; None on processes that are not in it, and if it has one member.
    """
    if _groups is None:
        return None
    return _group(sorted(ranks), name, datetime.timedelta(minutes=_groups.minutes))


def gather_to(rank: int, value: T, group: dist.ProcessGroup, what: str) -> list[T] | None:
    """Send the `value` of every process of a group of `new_group` to one of them, by rank. Two gathers.

    Args:
        rank: rank in the job of the process that receives the values.
        value: any picklable object.
        group: the group.
        what: see above.

    Returns:
        the values, in the order of ranks; None on the other processes.
    """
    assert _groups is not None
    values: list[T] | None = [value] * group.size() if dist.get_rank() == rank else None
    with _wait_errors(what, _groups):
        dist.gather_object(value, values, dst=rank, group=group)
    return values


# ---- the job: all processes ----


def barrier(what: str) -> None:
    """Wait until every process of the job has called this. One all-reduce of one float64."""
    any_rank(False, what)


def any_rank(flag: bool, what: str) -> bool:
    """Whether `flag` is true on any process of the job. One all-reduce of one float64."""
    return sum_over_job({"flag": float(flag)}, True, what)["flag"] > 0


def sum_over_job(sums: Mapping[str, float], contributes: bool, what: str) -> dict[str, float]:
    """Sum values by name over the contributing processes of the job. One all-reduce of len(sums) float64.

    Args:
        sums: values by name, with the same names on every process.
        contributes: whether the values of this process are included.
        what: see above.
    """
    names = sorted(sums)
    values = torch.tensor([sums[name] if contributes else 0.0 for name in names], dtype=torch.float64)
    if _groups:
        with _wait_errors(what, _groups):
            dist.all_reduce(values, group=_groups.job)
    return dict(zip(names, values.tolist(), strict=True))


def broadcast_from_main(value: T | None, what: str) -> T:
    """Send the `value` of rank 0 (any picklable object) to every process of the job; returns it.

    Other processes pass None. Two broadcasts, of the size and of the bytes.
    """
    objects = [value]
    if _groups:
        with _wait_errors(what, _groups):
            dist.broadcast_object_list(objects, src=0, group=_groups.job)
    return objects[0]  # type: ignore[return-value]


def all_gather_over_job(value: T, what: str) -> list[T]:
    """Return the value (any picklable object) of every process, by rank. Two all-gathers, of sizes and of bytes."""
    values: list[T] = [value] * dist.get_world_size()
    if _groups:
        with _wait_errors(what, _groups):
            dist.all_gather_object(values, value, group=_groups.job)
    return values


def gather_on_main(value: T, what: str) -> list[T] | None:
    """Return the value (any picklable object) of every process, by rank, on rank 0; None on the others."""
    return [value] if _groups is None else gather_to(0, value, _groups.job, what)


# ---- the leaders of all data-parallel ranks ----


def all_gather_over_leaders(values: Sequence[float], what: str) -> list[list[float]]:
    """Return the values of every leader, by data-parallel rank. One all-gather of len(values) float64.

    Collective over leaders, which must all pass the same number of values.
    """
    local = torch.tensor(values, dtype=torch.float64)
    if _groups is None or _groups.leaders is None:
        return [local.tolist()]
    gathered = [torch.empty_like(local) for _ in range(_groups.leaders.size())]
    with _wait_errors(what, _groups):
        dist.all_gather(gathered, local, group=_groups.leaders)
    return [row.tolist() for row in gathered]


def all_to_all_over_leaders(objects: Sequence[T], what: str) -> list[T]:
    """Send ``objects[r]`` (any picklable object) to the leader of data-parallel rank r.

    Two all-to-alls, of sizes and of bytes. Collective over leaders.

    Returns:
        the objects that the leaders sent to this process, by data-parallel rank.
    """
    if _groups is None or _groups.leaders is None:
        return list(objects)
    group = _groups.leaders
    packed = [pickle.dumps(item) for item in objects]
    sizes_out = torch.tensor([len(data) for data in packed])
    sizes_in = torch.empty_like(sizes_out)
    with _wait_errors(what, _groups):
        dist.all_to_all_single(sizes_in, sizes_out, group=group)
        sizes = sizes_in.tolist()
        sent = torch.frombuffer(bytearray(b"".join(packed)), dtype=torch.uint8)
        received = torch.empty(sum(sizes), dtype=torch.uint8)
        dist.all_to_all_single(received, sent, sizes, sizes_out.tolist(), group=group)
    return [pickle.loads(data.numpy().tobytes()) for data in received.split(sizes)]


# ---- one model replica: the processes that work on the same sequences ----


def broadcast_from_leader(value: T | None, what: str) -> T:
    """Send the leader's `value` (any picklable object) to every process of its data-parallel rank; returns it.

    Other processes pass None. Two broadcasts, of the size and of the bytes.
    """
    objects = [value]
    if _groups and _groups.replica:
        with _wait_errors(what, _groups):
            dist.broadcast_object_list(objects, src=_groups.leader, group=_groups.replica)
    return objects[0]  # type: ignore[return-value]


@contextmanager
def _wait_errors(what: str, groups: _Groups) -> Iterator[None]:
    """Convert the error of a collective to a WaitError that names `what`."""
    try:
        yield
    except RuntimeError as error:
        reason = first_line(error)
        if "imed out" in reason or "imeout" in reason:
            reason = f"nothing arrived within parallel.wait_timeout_minutes={groups.minutes:g}"
        else:
            reason = f"another process ended or cannot be reached ({reason})"
        raise WaitError(f"rank {dist.get_rank()} waited for {what}: {reason}") from error
