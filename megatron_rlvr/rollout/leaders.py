"""Work that only the leader of each model replica does, with results and failures known to the whole job."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from megatron_rlvr.errors import UserError
from megatron_rlvr.megatron import collectives
from megatron_rlvr.megatron.parallel import Layout
from megatron_rlvr.rollout.engines.base import EngineLostError, RolloutEngine, RolloutError

T = TypeVar("T")


def run_on_leaders(work: Callable[[], T], engine: RolloutEngine, layout: Layout) -> T | None:
    """Call `work` on every replica's leader, while the replica's other processes help `engine` to generate.

    Collective over the job; one all-reduce.

    Returns:
        the result on leaders, None on other processes.

    Raises:
        EngineLostError: on every process, when `work` raised it on one of them.
        RolloutError: on every process, when `work` raised a UserError on one of them.
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
    severity = 0.0 if failure is None else 2.0 if isinstance(failure, UserError) else 1.0
    worst = collectives.max_over_job({"failure": severity})["failure"]
    if worst == 2.0:
        raise RolloutError(str(failure or "the rollout failed on another rank, which reports the reason")) from failure
    if worst == 1.0:
        raise EngineLostError(str(failure or "another rank reports that no SGLang server is left")) from failure
    return result
