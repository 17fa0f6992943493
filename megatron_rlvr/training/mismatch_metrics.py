"""How far the policy that sampled a step and the policy that trains on it differ, over the whole job."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_rlvr.data.batch import RolloutBatch
from megatron_rlvr.megatron import collectives
from megatron_rlvr.megatron.parallel import Layout
from megatron_rlvr.objectives.importance import Corrected
from megatron_rlvr.objectives.order_statistics import quantile
from megatron_rlvr.objectives.sequence_ratio import sequence_sum
from megatron_rlvr.objectives.tokens import log_ratio_of
from megatron_rlvr.training.head import TokenScores

LARGEST_LOG_WEIGHT = 300.0
"""Importance weights of the metrics are cut at e^300: squared and summed over any rollout they fit float64."""
POSITIONS = (0, 1, 16, 256, 4096)
"""Where groups of positions in a response begin. The first token alone comes from the prefill of the prompt."""
OLDEST = 8
"""Tokens of older weights count as this many steps old."""


@dataclass(frozen=True)
class TokenMismatch:
    """What the two policies say of each token of this rank. Tensors are [T].

    Attributes:
        log_ratio: float64, d = ln pi_train - ln pi_rollout, in nats.
        surprise: float64, -ln pi_train - H, in nats: surprisal less its expectation under the training policy.
            Its mean is 0 if the training policy drew the token, whatever log-probs the engine reports.
        position: int64, place of the token in its response, from 0.
        age: int64, how many training steps the weights that drew the token are behind.
    """

    log_ratio: Tensor
    surprise: Tensor
    position: Tensor
    age: Tensor

    @classmethod
    def of(cls, batch: RolloutBatch, scores: TokenScores) -> TokenMismatch:
        """Compare the log-probs of the engine with the scores of the training weights before the updates."""
        tokens = torch.arange(batch.token_count)
        return cls(
            log_ratio=log_ratio_of(scores.logprob, batch.rollout_logprob).double(),
            surprise=-scores.logprob.double() - scores.entropy.double(),
            position=tokens - batch.offsets[batch.sequence_of_token()],
            age=torch.zeros_like(tokens) if batch.age is None else batch.age,
        )

    def columns(self, importance: Corrected | None) -> Iterator[tuple[str, Tensor]]:
        """Yield the values that the metrics add up over tokens, by name; one at a time, because each is [T]."""
        # Of the weight e^d over 1, exact where it is tiny.
        excess = self.log_ratio.clamp(max=LARGEST_LOG_WEIGHT).expm1()
        yield "tokens", torch.ones_like(self.log_ratio)
        yield "difference", self.log_ratio.abs()
        yield "k1", -self.log_ratio
        yield "k2", self.log_ratio.square() / 2
        yield "k3", excess - self.log_ratio
        yield "excess", excess
        yield "excess_squared", excess.square()
        fresh = self.age == 0
        yield "fresh", fresh.double()
        yield "surprise", self.surprise.masked_fill(~fresh, 0.0)
        yield "surprise_squared", self.surprise.masked_fill(~fresh, 0.0).square()
        if importance is not None:
            yield "masked", importance.masked.double()
            yield "truncated", importance.truncated.double()


def mismatch_metrics(
    batch: RolloutBatch, tokens: TokenMismatch, importance: Corrected | None, layout: Layout
) -> dict[str, float]:
    """Return ``kl_rollout`` and ``mismatch/*``, see docs/metrics.md.

    Collective over the job: ten all-reduces. A log-prob of NaN from the engine makes the metrics NaN.

    Args:
        batch: this rank's rollouts.
        tokens: what the policies say of its tokens; only those of reporting ranks are used.
        importance: the importance weights of the step's tokens, if there are corrections.
        layout: position of this process in the process groups.
    """

    def over_job(sums: Tensor) -> Tensor:
        return collectives.sum_tensor_over_job(sums, contributes=layout.is_reporting_rank)

    difference = tokens.log_ratio.abs()
    position = torch.bucketize(tokens.position, torch.tensor(POSITIONS), right=True) - 1
    age = tokens.age.clamp(0, OLDEST)
    by_group = {
        name: torch.cat([_sums(values, position, len(POSITIONS)), _sums(values, age, OLDEST + 1)])
        for name, values in tokens.columns(importance)
    }
    names = list(by_group)
    log_weight = sequence_sum(tokens.log_ratio, batch.sequence_of_token(), len(batch.rewards))
    counts = layout.is_reporting_rank and len(difference) > 0
    maxima = collectives.max_over_job(
        {
            "difference": float(difference.max()) if counts else 0.0,
            "log_weight": float(log_weight.max()) if counts else -math.inf,
        }
    )
    # Products over thousands of tokens overflow, so that the weights of sequences are relative to the largest.
    relative = (log_weight - maxima["log_weight"]).exp()
    of_sequences = torch.stack([torch.ones_like(relative).sum(), relative.sum(), relative.square().sum()])
    sums = over_job(torch.cat([torch.cat(list(by_group.values())), of_sequences]))
    table, (sequences, relatives, squares) = sums[:-3].view(len(names), -1), sums[-3:].tolist()
    total = dict(zip(names, table[:, : len(POSITIONS)].sum(1).tolist(), strict=True))
    count, largest = total["tokens"], math.exp(min(2 * maxima["log_weight"], LARGEST_LOG_WEIGHT))
    fresh = max(1.0, total["fresh"])
    excess, chi_square = total["excess"] / count, (2 * total["excess"] + total["excess_squared"]) / count
    metrics = {
        "kl_rollout": total["k3"] / count,
        "mismatch/k1": total["k1"] / count,
        "mismatch/k2": total["k2"] / count,
        "mismatch/mean": total["difference"] / count,
        "mismatch/p99": quantile(difference, 0.99, count, over_job),
        "mismatch/max": maxima["difference"],
        "mismatch/chi_square": chi_square,
        "mismatch/chi_square_sequence": largest * squares / sequences - 1,
        # Kish's effective sample size with importance weights train / rollout, as a fraction of the samples.
        "mismatch/effective_sample_size": (1 + excess) ** 2 / (1 + chi_square),
        "mismatch/effective_sample_size_sequence": relatives**2 / (sequences * squares),
        # The mean weight of samples is the part of the training policy's probability that the engine can sample.
        "mismatch/missing_mass": -excess,
        "mismatch/missing_mass_standard_error": math.sqrt(total["excess_squared"]) / count,
        "mismatch/fresh_fraction": total["fresh"] / count,
        "mismatch/surprise": total["surprise"] / fresh,
        "mismatch/surprise_standard_error": math.sqrt(total["surprise_squared"]) / fresh,
    }
    shares = ["masked", "truncated"] if importance is not None else []
    metrics |= {f"mismatch/{name}_fraction": total[name] / count for name in shares}
    of_groups = [dict(zip(names, column, strict=True)) for column in table.T.tolist()]
    return metrics | _group_metrics(of_groups, shares, count)


def _group_metrics(sums: Sequence[dict[str, float]], shares: Sequence[str], count: float) -> dict[str, float]:
    """Return the metrics of every group of positions, then of every age, that has tokens.

    Age 0 is left out if all tokens are fresh.

    Args:
        sums: of each group, the sums over its tokens by name.
        shares: names of the sums that are reported as a fraction of the tokens.
        count: number of tokens of the job.
    """
    metrics = {}
    groups = [f"position_{start}" for start in POSITIONS] + [f"age_{age}" for age in range(OLDEST + 1)]
    for group, found in zip(groups, sums, strict=True):
        if found["tokens"] and not (group == "age_0" and found["tokens"] == count):
            metrics[f"mismatch/{group}/mean"] = found["difference"] / found["tokens"]
            metrics[f"mismatch/{group}/kl"] = found["k3"] / found["tokens"]
            metrics |= {f"mismatch/{group}/{name}_fraction": found[name] / found["tokens"] for name in shares}
    return metrics


def _sums(values: Tensor, group: Tensor, groups: int) -> Tensor:
    """Return the sum of `values`, [T], over each of the groups: float64 [groups]."""
    return values.new_zeros(groups).index_add(0, group, values)
