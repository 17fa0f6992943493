"""Work that only the leader of each model replica does, with results and failures known to the whole job."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from megatron_rlvr.errors import UserError
from megatron_rlvr.megatron import waiting
from megatron_rlvr.megatron.parallel import Layout
from megatron_rlvr.rollout.engines.base import EngineLostError, RolloutEngine, RolloutError

T = TypeVar("T")


def run_on_leaders(work: Callable[[], T], engine: RolloutEngine, layout: Layout, what: str) -> T | None:
    """Call `work` on the leader of every model replica, while its other processes take part in `engine.generate`.

    Collective over the job: one all-reduce, and one all-gather of error texts if `work` failed anywhere. Processes that
    are done wait outside NCCL.

    Args:
        work: what a leader does.
        engine: the engine that `work` may generate with.
        layout: position of this process.
        what: what the other processes wait for, for the error at the deadline.

    Returns:
        the result of `work` on leaders, None on other processes.

    Raises:
        EngineLostError: on every process, if `work` raised it on one of them.
        RolloutError: on every process, if `work` raised a UserError on one of them.
    """
    result: T | None = None
    failure: EngineLostError | UserError | None = None
    if layout.is_leader:
        try:
            result = work()
        except (EngineLostError, UserError) as error:
            failure = error
        engine.dismiss()
    else:
        engine.assist()
    if waiting.any_rank(failure is not None, what):
        raise _common_failure(failure, what) from failure
    return result


def _common_failure(failure: EngineLostError | UserError | None, what: str) -> EngineLostError | RolloutError:
    """Return the error that this process raises: its own, or the first of another rank. User errors take precedence."""
    local_report = None if failure is None else (isinstance(failure, UserError), str(failure))
    reports = enumerate(waiting.all_gather_over_job(local_report, f"{what}, which failed on one of the ranks"))
    failures = [(rank, *report) for rank, report in reports if report is not None]
    is_user_error = any(by_user for _, by_user, _ in failures)
    rank, text = next((rank, text) for rank, by_user, text in failures if by_user == is_user_error)
    if failure is not None and isinstance(failure, UserError) == is_user_error:
        text = str(failure)
    else:
        text = f"{text} (reported by rank {rank})"
    return RolloutError(text) if is_user_error else EngineLostError(text)
