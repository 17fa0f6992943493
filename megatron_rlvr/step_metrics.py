"""The numbers of one step: sums over this rank's tokens, added over the job, named as docs/metrics.md lists them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_rlvr.backend import parallel
from megatron_rlvr.backend.policy import UPDATE_SUMS, TokenScores, UpdateReport
from megatron_rlvr.control import ClipThresholds
from megatron_rlvr.data.batch import RolloutBatch

Record = dict[str, float]


def rollout_metrics(batch: RolloutBatch, advantage: Tensor, scores: TokenScores, reports: bool, leader: bool) -> Record:
    """What a step knows before its updates: reward, lengths, exact entropy, train/rollout mismatch, predicted change.

    The predicted change is the mean over tokens of non-zero advantage, per unit of learning rate.

    Args:
        batch: this rank's rollouts.
        advantage: float32 [N].
        scores: of the old policy; real where `reports`.
        reports: whether this process speaks for its data-parallel rank's last stage.
        leader: whether it speaks for its data-parallel rank's rollouts.
    """
    difference = scores.logprob - batch.rollout_logprob
    groups = batch.rewards.view(-1, batch.group_size)
    sums = {
        "entropy": scores.entropy.sum(dtype=torch.float64),
        "entropy_change/predicted": scores.entropy_change.sum(dtype=torch.float64),
        # k3 of KL(rollout || train), from tokens that the rollout policy drew: r - 1 - ln r with r = train / rollout.
        "kl_rollout": (difference.expm1() - difference).sum(dtype=torch.float64),
        "mismatch/mean": difference.abs().sum(dtype=torch.float64),
    }
    counted = {
        "tokens": batch.token_count,
        "active_tokens": batch.response_lengths[advantage != 0].sum(),
        "sequences": len(batch.rewards),
        "groups": len(groups),
        "reward": batch.rewards.sum(dtype=torch.float64),
        "truncated": batch.truncated.sum(),
        "mixed_groups": (groups.amax(1) > groups.amin(1)).sum(),
    }
    total = parallel.sum_over_job({k: float(v) for k, v in sums.items()}, contributes=reports)
    count = parallel.sum_over_job({k: float(v) for k, v in counted.items()}, contributes=leader)
    largest = float(difference.abs().max()) if reports and len(difference) else 0.0
    return {
        "reward": count["reward"] / count["sequences"],
        "tokens": count["tokens"],
        "response_length": count["tokens"] / count["sequences"],
        "truncated_fraction": count["truncated"] / count["sequences"],
        "mixed_groups_fraction": count["mixed_groups"] / count["groups"],
        **{name: value / count["tokens"] for name, value in total.items()},
        "entropy_change/predicted": total["entropy_change/predicted"] / max(1.0, count["active_tokens"]),
        "mismatch/max": parallel.max_over_job({"largest": largest})["largest"],
    }


def update_metrics(updates: Sequence[UpdateReport], epochs: int, reports: bool) -> Record:
    """What the updates of a step did: clip and region fractions, largest ratio, gradient norm, measured entropy change.

    Fractions are of tokens with a non-zero advantage. The measured change is the mean, over those of the last epoch, of
    the entropy at the moment of their update less that before the step: the same states, no sampling noise.
    """
    every = torch.stack([u.sums for u in updates]).cpu()
    last = every[-(len(updates) // epochs) :]
    whole = dict(zip(UPDATE_SUMS, every.sum(0).tolist(), strict=True))
    end = dict(zip(UPDATE_SUMS, last.sum(0).tolist(), strict=True))
    whole |= {"drift": end["entropy_drift"], "drift_tokens": end["active_tokens"]}
    total = parallel.sum_over_job(whole, contributes=reports)
    active = max(1.0, total["active_tokens"])
    ratio = parallel.max_over_job({"ratio": max(float(u.ratio_max) for u in updates) if reports else 0.0})["ratio"]
    return {
        "loss": total["loss"] / len(updates),
        "grad_norm": sum(u.grad_norm for u in updates) / len(updates),
        "ratio_max": ratio,
        "clip/fraction_high": total["clipped_high"] / active,
        "clip/fraction_low": total["clipped_low"] / active,
        **{f"region/{name}": total[name] / active for name in ("E1", "E2", "E3", "E4")},
        "entropy_change/measured": total["drift"] / max(1.0, total["drift_tokens"]),
    }


def threshold_metrics(thresholds: ClipThresholds) -> Record:
    """The scalars that a step's clipping is."""
    return {
        "clip/upper_slope": thresholds.upper.slope,
        "clip/upper_intercept": thresholds.upper.intercept,
        "clip/lower_slope": thresholds.lower.slope,
        "clip/lower_intercept": thresholds.lower.intercept,
    }
