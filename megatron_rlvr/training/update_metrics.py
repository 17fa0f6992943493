"""Measurements of the updates of a step, over the whole job, under the names of docs/metrics.md."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_rlvr.control.regions import REGIONS
from megatron_rlvr.errors import UserError
from megatron_rlvr.megatron import collectives
from megatron_rlvr.training.loss import LOSS_SUMS
from megatron_rlvr.training.policy import UpdateReport


def update_metrics(
    updates: Sequence[UpdateReport], epochs: int, weights_are_finite: Tensor, is_reporting_rank: bool
) -> dict[str, float]:
    """Return clip and region fractions, largest ratio, gradient norm, and measured entropy change.

    Collective over the job: two all-reduces. Skipped updates count in ``skipped_updates`` alone. Fractions are relative
    to the tokens with a non-zero advantage. The measured entropy change is a mean over the tokens of the last epoch:
    the entropy in the forward pass of a token's update minus the entropy before the step. Both are entropies of the
    same positions, so there is no sampling noise.

    Args:
        updates: all updates of the step, in order.
        epochs: number of passes over the rollout.
        weights_are_finite: whether this process has only finite weights after the updates, bool [].
        is_reporting_rank: whether this process reports for the last pipeline stage of its data-parallel rank.

    Raises:
        UserError: on every process, if weights of any process are not finite.
    """
    columns = [torch.cat([u.sums, u.ratio_max.double()[None]]) for u in updates]
    table = torch.cat([*columns, weights_are_finite.double()[None]]).cpu()  # one wait for the device
    applied = torch.tensor([update.applied for update in updates])
    per_update = table[:-1].view(len(updates), -1).where(applied[:, None], 0.0)
    sums = per_update[:, :-1]
    last_epoch = sums[-(len(updates) // epochs) :]
    local = dict(zip(LOSS_SUMS, sums.sum(0).tolist(), strict=True))
    end = dict(zip(LOSS_SUMS, last_epoch.sum(0).tolist(), strict=True))
    local |= {"drift": end["entropy_drift"], "drift_tokens": end["active_tokens"]}
    local["policy_change"] = end["policy_change"]
    total = collectives.sum_over_job(local, contributes=is_reporting_rank)
    active = max(1.0, total["active_tokens"])
    maxima = {"ratio": float(per_update[:, -1].max()) if is_reporting_rank else 0.0, "broken": float(table[-1] == 0)}
    maxima = collectives.max_over_job(maxima)
    if maxima["broken"]:
        raise UserError(
            "the updates of this step produced weights that are not finite from a finite gradient: nothing was saved; "
            "lower optimizer.learning_rate or raise optimizer.epsilon, and start again from the newest checkpoint"
        )
    norms = [update.grad_norm for update in updates if update.applied]
    return {
        "loss": total["loss"] / max(1, len(norms)),
        "grad_norm": sum(norms) / len(norms) if norms else math.nan,
        "skipped_updates": float(len(updates) - len(norms)),
        "ratio_max": maxima["ratio"],
        "clip/fraction_high": total["clipped_high"] / active,
        "clip/fraction_low": total["clipped_low"] / active,
        **{f"region/{name}": total[name] / active for name in REGIONS},
        "entropy_change/measured": total["drift"] / max(1.0, total["drift_tokens"]),
        "kl_update": total["policy_change"] / max(1.0, total["drift_tokens"]),
    }


def entropy_shift(update: UpdateReport, is_reporting_rank: bool) -> float | None:
    """Return how far the earlier updates of a step have moved entropy, measured on the tokens of this update.

    Collective over the job: one all-reduce, or none for a skipped update.

    Returns:
        ln(H / H0), where H is the mean entropy of the update's active tokens in its forward pass and H0 their mean
        entropy before the step. The ratio is at least 0.001, because it may round to 0 if entropy has vanished. None if
        there is no active token, and if the update was skipped, whose entropy may not be finite.
    """
    if not update.applied:
        return None
    sums = dict(zip(LOSS_SUMS, update.sums.tolist(), strict=True))
    total = collectives.sum_over_job(
        {name: sums[name] for name in ("entropy_drift", "old_entropy")}, contributes=is_reporting_rank
    )
    if not (total["old_entropy"] > 0.0 and math.isfinite(total["entropy_drift"])):
        return None
    return math.log(max(1e-3, 1.0 + total["entropy_drift"] / total["old_entropy"]))
