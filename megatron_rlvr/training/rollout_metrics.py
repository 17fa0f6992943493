"""Measurements of a step before its updates, over the whole job, under the names of docs/metrics.md."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_rlvr.control import SteeringResponse
from megatron_rlvr.control.regions import classify, disagrees, steering_sums
from megatron_rlvr.data.batch import RolloutBatch
from megatron_rlvr.errors import UserError
from megatron_rlvr.megatron import collectives
from megatron_rlvr.megatron.parallel import Layout
from megatron_rlvr.objectives import ReferenceKL, informative_groups
from megatron_rlvr.objectives.importance import Corrected
from megatron_rlvr.objectives.reference_kl import kl_estimate
from megatron_rlvr.training.head import TokenScores
from megatron_rlvr.training.mismatch_metrics import TokenMismatch, mismatch_metrics


@dataclass(frozen=True)
class RolloutMeasure:
    """Measurements of a step before its updates, the same on every process.

    Attributes:
        entropy: mean exact entropy over all response tokens of the job, in nats per token.
        standard_error: standard error of `entropy`, in nats per token.
        response: how the step's tokens respond to region steering.
        metrics: metrics by name.
        importance_weight: float32 [T], importance weight of each token; None without corrections.
    """

    entropy: float
    standard_error: float
    response: SteeringResponse
    metrics: dict[str, float]
    importance_weight: Tensor | None = None


def measure_rollout(
    batch: RolloutBatch,
    token_weight: Tensor,
    scores: TokenScores,
    layout: Layout,
    importance: Corrected | None = None,
    reference_kl: ReferenceKL | None = None,
    advantage: Tensor | None = None,
) -> RolloutMeasure:
    """Measure reward, lengths, exact entropy, train/rollout mismatch, KL to the reference, and response to steering.

    Collective over the job: thirteen all-reduces. A log-prob of NaN from the engine makes the mismatch NaN, nothing
    else.

    Args:
        batch: this rank's rollouts.
        token_weight: float32 [N], aggregation weight of the tokens of each sequence.
        scores: token scores before the updates; only those of reporting ranks are used.
        layout: position of this process in the process groups.
        importance: the importance weights of the step's tokens, if there are corrections.
        reference_kl: the penalty on KL to the reference, whose log-probs the batch then has.
        advantage: float32 [N], advantage of each sequence, for the metric of the regions.

    Raises:
        UserError: on every process, if the entropy or the KL to the reference is not finite.
    """
    groups = batch.rewards.view(-1, batch.group_size)
    counts: dict[str, float | Tensor] = {
        "tokens": batch.token_count,
        "sequences": len(batch.rewards),
        "groups": len(groups),
        "reward": batch.rewards.sum(dtype=torch.float64),
        "truncated": batch.truncated.sum(),
        "mixed_groups": informative_groups(groups).sum(),
    }
    token_sums = _token_sums(batch, token_weight, scores, reference_kl, advantage)
    total = collectives.sum_over_job(_floats(token_sums), contributes=layout.is_reporting_rank)
    count = collectives.sum_over_job(_floats(counts), contributes=layout.is_leader)
    tokens = count["tokens"]
    entropy = total["entropy"] / tokens
    if not math.isfinite(entropy):
        raise UserError(
            f"the entropy of the policy is {entropy}: its forward pass overflows, although its weights are finite; "
            "lower optimizer.learning_rate, and remove the newest checkpoint if it was written after the last good step"
        )
    standard_error = _standard_error(batch, scores.entropy, entropy, int(count["groups"]), tokens, layout)
    metrics = {
        "reward": count["reward"] / count["sequences"],
        "tokens": tokens,
        "response_length": tokens / count["sequences"],
        "truncated_fraction": count["truncated"] / count["sequences"],
        "mixed_groups_fraction": count["mixed_groups"] / count["groups"],
        "entropy": entropy,
        "entropy_standard_error": standard_error,
        **mismatch_metrics(batch, TokenMismatch.of(batch, scores), importance, layout),
    }
    if advantage is not None:
        metrics["region/disagreement"] = total["disagreeing"] / max(1.0, total["regions"])
    if reference_kl is not None:
        metrics |= _kl_metrics(reference_kl, total, tokens, count["sequences"])
    steering = SteeringResponse.from_sums([total[f"response/{i}"] for i in range(4)])
    return RolloutMeasure(entropy, standard_error, steering, metrics, importance.weight if importance else None)


def _token_sums(
    batch: RolloutBatch,
    token_weight: Tensor,
    scores: TokenScores,
    reference_kl: ReferenceKL | None,
    advantage: Tensor | None,
) -> dict[str, Tensor]:
    """Return the sums over this rank's tokens from which `measure_rollout` computes its metrics."""
    sequence = batch.sequence_of_token()
    response = steering_sums(scores.entropy_change, scores.ascent, token_weight[sequence])
    sums = {
        "entropy": scores.entropy.sum(dtype=torch.float64),
        **{f"response/{i}": value for i, value in enumerate(response)},
    }
    if advantage is not None:
        region = classify(scores.logprob, scores.entropy, advantage[sequence])
        sums["regions"] = (region > 0).sum()
        sums["disagreeing"] = disagrees(region, scores.entropy_change).sum()
    if reference_kl is not None and batch.reference_logprob is not None:
        sums["kl_reference"] = kl_estimate("k3", scores.logprob, batch.reference_logprob).sum()
        sums["kl_estimate"] = reference_kl.estimate(scores.logprob, batch.reference_logprob).sum()
    return sums


def _kl_metrics(
    reference_kl: ReferenceKL, total: Mapping[str, float], tokens: float, sequences: float
) -> dict[str, float]:
    """Return ``kl_reference`` and ``kl_penalty``.

    Raises:
        UserError: if the KL to the reference is not finite.
    """
    kl = total["kl_reference"] / tokens
    if not math.isfinite(kl):
        raise UserError(
            f"the KL to the reference is {kl}: the forward pass of the reference overflows, although its weights are "
            "finite; set reference.path to another model, or algorithm.kl_coefficient=0"
        )
    terms = tokens if reference_kl.place == "loss" else sequences
    return {"kl_reference": kl, "kl_penalty": reference_kl.coefficient * total["kl_estimate"] / terms}


def _floats(values: Mapping[str, float | Tensor]) -> dict[str, float]:
    """Return the values as Python numbers."""
    return {name: float(value) for name, value in values.items()}


def _standard_error(
    batch: RolloutBatch, token_entropy: Tensor, entropy: float, groups: int, tokens: float, layout: Layout
) -> float:
    """Return the standard error of the mean entropy, in nats per token.

    The mean entropy is a ratio estimator over groups, because completions of one prompt are not independent. With
    stratified prompts, only the variation within strata is random. It is estimated from successive differences: half
    the squared differences between neighbours in the order of the strata (Wolter, Introduction to Variance Estimation,
    section 8.2). All processes then receive all groups, so that neighbours do not depend on the layout.

    Of the prompts of the data, a step samples the fraction f without replacement. Where f is known, the variation
    between prompts counts 1 - f times, and that between completions of a prompt f times (two-stage sampling; Cochran,
    Sampling Techniques, equation 10.15). A step that samples every prompt has the error of its completions alone.

    Args:
        batch: this rank's rollouts.
        token_entropy: float32 [T], entropy of each token of this rank.
        entropy: mean entropy over all tokens of the job.
        groups, tokens: number of groups and of response tokens in the job.
        layout: position of this process in the process groups.
    """
    residual = torch.zeros(len(batch.rewards), dtype=torch.float64)
    residual.index_add_(0, batch.sequence_of_token(), token_entropy.double() - entropy)
    of_group = residual.view(-1, batch.group_size)
    fraction = batch.sampled_fraction if batch.group_size > 1 else 0.0
    within = batch.group_size * of_group.var(1) if fraction else torch.zeros(len(of_group), dtype=torch.float64)
    if batch.strata is None or batch.slots is None:
        sums = {"between": float(of_group.sum(1).square().sum()), "within": float(within.sum())}
        total = collectives.sum_over_job(sums, contributes=layout.is_reporting_rank)
    else:
        by_slot = torch.zeros(3, groups, dtype=torch.float64)
        by_slot[:, batch.slots] = torch.stack([of_group.sum(1), within, batch.strata])
        summed, within, strata = collectives.sum_tensor_over_job(by_slot, contributes=layout.is_reporting_rank)
        differences = summed[strata.argsort(stable=True)].diff()
        between = differences.square().sum() * groups / (2 * max(1, len(differences)))
        total = {"between": float(between), "within": float(within.sum())}
    return math.sqrt((1.0 - fraction) * total["between"] + fraction * total["within"]) / tokens
