"""Measurements of routing replay, under the names of docs/metrics.md."""

from __future__ import annotations

import functools
import sys
from dataclasses import replace

from torch import Tensor

from megatron_rlvr.data.batch import RolloutBatch
from megatron_rlvr.megatron import collectives
from megatron_rlvr.megatron.parallel import Layout
from megatron_rlvr.training.mismatch_metrics import TokenMismatch, mismatch_metrics
from megatron_rlvr.training.policy import Policy


def routing_metrics(
    policy: Policy, batch: RolloutBatch, advantage: Tensor, layout: Layout, *, compare: bool
) -> dict[str, float]:
    """Measure routing replay after `Policy.score` and before the updates; nothing without ``rollout.routing_replay``.

    Collective over the job: two all-reduces, and with `compare` one more scoring pass and `mismatch_metrics`.

    Args:
        policy: the policy that scored the batch.
        batch: this rank's rollouts.
        advantage: float32 [N], advantage of each sequence of the batch.
        layout: position of this process in the process groups.
        compare: also measure the mismatch of rollout and training if the routers choose all experts.
    """
    if batch.routes is None:
        return {}
    # Every process counts the tokens and layers that it computed.
    differing, replayed = policy.take_route_counts().tolist()
    counted = collectives.sum_over_job({"differing": differing, "replayed": replayed}, contributes=True)
    sums = {"sequences": float(len(batch.tokens)), "unknown": float((batch.routes.counts == 0).sum())}
    sums["tokens"] = float(batch.token_count)
    total = collectives.sum_over_job(sums, contributes=layout.is_leader)
    if total["unknown"] and layout.is_main:
        _warn_of_unknown_routes()
    metrics = {
        "routing_replay/differing": counted["differing"] / max(1.0, counted["replayed"]),
        "routing_replay/unknown_fraction": total["unknown"] / total["sequences"],
    }
    if compare:
        scores = policy.score(replace(batch, routes=None), advantage)
        mismatch = mismatch_metrics(batch, TokenMismatch.of(batch, scores), None, layout)
        metrics["routing_replay/kl_rollout_without"] = mismatch["kl_rollout"]
        metrics["routing_replay/mismatch_without"] = mismatch["mismatch/mean"]
    return metrics


@functools.cache
def _warn_of_unknown_routes() -> None:
    """Warn in the first step in which some routes are not known."""
    print(
        "warning: SGLang ran out of memory and computed completions twice, so their routes are not those of their "
        "log-probs and are not replayed (routing_replay/unknown_fraction): give the servers more memory, or lower "
        "rollout.sglang.concurrency",
        file=sys.stderr,
    )
