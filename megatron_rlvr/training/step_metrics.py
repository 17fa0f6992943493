"""The numbers of one step: sums over this rank's tokens, added over the job, named as docs/metrics.md lists them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_rlvr.control import SteeringResponse
from megatron_rlvr.control.regions import steering_sums
from megatron_rlvr.data.batch import RolloutBatch
from megatron_rlvr.megatron import collectives
from megatron_rlvr.objectives import informative_groups
from megatron_rlvr.training.head import TokenScores
from megatron_rlvr.training.loss import LOSS_SUMS
from megatron_rlvr.training.policy import UpdateReport

Record = dict[str, float]


@dataclass(frozen=True)
class RolloutMeasure:
    """What a step knows before its updates, the same on every process.

    Attributes:
        entropy: exact mean over all response tokens of the job, nats.
        standard_error: of `entropy`, from the spread between prompts (ratio estimator over groups), of a stratified
            step from that between neighbours.
        response: what region steering would do to these tokens.
        record: the metrics of this part of the step.
    """

    entropy: float
    standard_error: float
    response: SteeringResponse
    record: Record


def measure_rollout(
    batch: RolloutBatch, token_weight: Tensor, scores: TokenScores, is_reporting_rank: bool, leader: bool
) -> RolloutMeasure:
    """Reward, lengths, exact entropy, train/rollout mismatch, and the response to steering of a step.

    Args:
        batch: this rank's rollouts.
        token_weight: float32 [N].
        scores: of the old policy; real where `is_reporting_rank`.
        is_reporting_rank: whether this process reports for the last pipeline stage of its data-parallel rank.
        leader: whether it speaks for its data-parallel rank's rollouts.
    """
    difference = scores.logprob - batch.rollout_logprob
    sequence = batch.sequence_of_token()
    groups = batch.rewards.view(-1, batch.group_size)
    group_tokens = batch.response_lengths.view(-1, batch.group_size).sum(1).double()
    group_entropy = torch.zeros_like(group_tokens).index_add(0, sequence // batch.group_size, scores.entropy.double())
    response = steering_sums(scores.entropy_change, scores.ascent, token_weight[sequence])
    scored = {
        "entropy": scores.entropy.sum(dtype=torch.float64),
        # k3 of KL(rollout || train), from tokens that the rollout policy drew: r - 1 - ln r with r = train / rollout.
        "kl_rollout": (difference.expm1() - difference).sum(dtype=torch.float64),
        "mismatch/mean": difference.abs().sum(dtype=torch.float64),
        "importance": difference.exp().sum(dtype=torch.float64),
        "importance_squared": difference.mul(2).exp().sum(dtype=torch.float64),
        **{f"response/{i}": value for i, value in enumerate(response)},
    }
    rolled: dict[str, float | Tensor] = {
        "tokens": batch.token_count,
        "sequences": len(batch.rewards),
        "groups": len(groups),
        "reward": batch.rewards.sum(dtype=torch.float64),
        "truncated": batch.truncated.sum(),
        "mixed_groups": informative_groups(groups).sum(),
    }
    total = collectives.sum_over_job({k: float(v) for k, v in scored.items()}, contributes=is_reporting_rank)
    count = collectives.sum_over_job({k: float(v) for k, v in rolled.items()}, contributes=leader)
    squared = _squares(torch.stack([group_entropy, group_tokens]), batch, int(count["groups"]), is_reporting_rank)
    largest = float(difference.abs().max()) if is_reporting_rank and len(difference) else 0.0
    tokens = count["tokens"]
    entropy = total["entropy"] / tokens
    squares = squared["ee"] - 2 * entropy * squared["et"] + entropy**2 * squared["tt"]
    standard_error = math.sqrt(max(0.0, squares)) / tokens
    record = {
        "reward": count["reward"] / count["sequences"],
        "tokens": tokens,
        "response_length": tokens / count["sequences"],
        "truncated_fraction": count["truncated"] / count["sequences"],
        "mixed_groups_fraction": count["mixed_groups"] / count["groups"],
        "entropy": entropy,
        "entropy_standard_error": standard_error,
        "kl_rollout": total["kl_rollout"] / tokens,
        "mismatch/mean": total["mismatch/mean"] / tokens,
        # Kish's effective sample size of the tokens under importance weights train / rollout, as a share of them.
        "mismatch/effective_sample_size": total["importance"] ** 2 / (tokens * total["importance_squared"]),
        "mismatch/max": collectives.max_over_job({"largest": largest})["largest"],
    }
    steering = SteeringResponse.from_sums([total[f"response/{i}"] for i in range(4)])
    return RolloutMeasure(entropy, standard_error, steering, record)


def _squares(groups: Tensor, batch: RolloutBatch, count: int, is_reporting_rank: bool) -> dict[str, float]:
    """Sums of squares and products of the job's ``count`` groups' (entropy, tokens), here [2, P / D]: ee, et, tt.

    They are the variances of the sums over groups, but for the mean. Of stratified groups half the squared differences
    of neighbours count, since only what differs within strata is left to chance (successive differences; Wolter,
    Introduction to Variance Estimation, section 8.2); all processes then see all groups, for neighbours must not depend
    on the layout.
    """
    if batch.strata is None or batch.slots is None:
        return collectives.sum_over_job(_products(groups), contributes=is_reporting_rank)
    every = torch.zeros(3, count, dtype=torch.float64)
    every[:, batch.slots] = torch.cat([groups, batch.strata[None]])
    every = collectives.sum_tensor_over_job(every, contributes=is_reporting_rank)
    steps = every[:2, every[2].argsort(stable=True)].diff(dim=1)
    return _products(steps * math.sqrt(every.shape[1] / (2 * max(1, steps.shape[1]))))


def _products(groups: Tensor) -> dict[str, float]:
    entropy, tokens = groups
    sums = {"ee": entropy.square().sum(), "et": (entropy * tokens).sum(), "tt": tokens.square().sum()}
    return {name: float(value) for name, value in sums.items()}


def entropy_shift(update: UpdateReport, is_reporting_rank: bool) -> float | None:
    """ln of the mean entropy of an update's active tokens in its forward pass over that before the step. Collective.

    None for an update without active tokens; bounded where entropy has all but vanished.
    """
    sums = dict(zip(LOSS_SUMS, update.sums.tolist(), strict=True))
    total = collectives.sum_over_job(
        {k: sums[k] for k in ("entropy_drift", "old_entropy")}, contributes=is_reporting_rank
    )
    if not total["old_entropy"] > 0.0:
        return None
    return math.log(max(1e-3, 1.0 + total["entropy_drift"] / total["old_entropy"]))


def update_metrics(updates: Sequence[UpdateReport], epochs: int, is_reporting_rank: bool) -> Record:
    """What the updates of a step did: clip and region fractions, largest ratio, gradient norm, measured entropy change.

    Fractions are of tokens with a non-zero advantage. The measured change is the mean, over those of the last epoch, of
    the entropy at the moment of their update less that before the step: the same states, no sampling noise.
    """
    every = torch.stack([u.sums for u in updates]).cpu()
    last = every[-(len(updates) // epochs) :]
    whole = dict(zip(LOSS_SUMS, every.sum(0).tolist(), strict=True))
    end = dict(zip(LOSS_SUMS, last.sum(0).tolist(), strict=True))
    whole |= {"drift": end["entropy_drift"], "drift_tokens": end["active_tokens"]}
    total = collectives.sum_over_job(whole, contributes=is_reporting_rank)
    active = max(1.0, total["active_tokens"])
    largest = max(float(u.ratio_max) for u in updates) if is_reporting_rank else 0.0
    ratio = collectives.max_over_job({"ratio": largest})["ratio"]
    return {
        "loss": total["loss"] / len(updates),
        "grad_norm": sum(u.grad_norm for u in updates) / len(updates),
        "ratio_max": ratio,
        "clip/fraction_high": total["clipped_high"] / active,
        "clip/fraction_low": total["clipped_low"] / active,
        **{f"region/{name}": total[name] / active for name in ("E1", "E2", "E3", "E4")},
        "entropy_change/measured": total["drift"] / max(1.0, total["drift_tokens"]),
    }
