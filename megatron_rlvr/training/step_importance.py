"""The importance weights of the tokens of a step, which correct for the policy that sampled them."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_rlvr.data.batch import RolloutBatch
from megatron_rlvr.megatron import collectives
from megatron_rlvr.megatron.parallel import Layout
from megatron_rlvr.objectives.importance import Corrected, ImportanceWeights, SampledTokens
from megatron_rlvr.training.head import TokenScores


def step_importance(
    importance: ImportanceWeights,
    batch: RolloutBatch,
    advantage: Tensor,
    scores: TokenScores,
    minibatches: int,
    layout: Layout,
) -> Corrected:
    """Compute the importance weights of a step's tokens before its updates.

    The weight is that of the corrections that do not follow updates. Tokens that one which does would mask in the first
    update are among the masked ones.

    Collective over the job: none, or eight all-reduces per minibatch and correction that compares the tokens of a
    minibatch with each other.

    Args:
        importance: the corrections of the run.
        batch: this rank's rollouts.
        advantage: float32 [N], advantage of each sequence.
        scores: token scores before the updates.
        minibatches: number of minibatches.
        layout: position of this process in the process groups.
    """

    def over_job(sums: Tensor) -> Tensor:
        return collectives.sum_tensor_over_job(sums, contributes=layout.is_reporting_rank)

    sequence = batch.sequence_of_token()
    parts: list[tuple[Corrected, Corrected]] = []
    for members in batch.minibatches(minibatches):
        first, count = int(members[0]), len(members)
        chosen = (sequence >= first) & (sequence < first + count)
        index = sequence[chosen]
        tokens = SampledTokens(
            scores.logprob[chosen], batch.rollout_logprob[chosen], advantage[index], index - first, count
        )
        before = importance.before_updates(tokens, over_job)
        parts.append((before, before * importance.during_update(tokens)))
    return Corrected(
        weight=torch.cat([before.weight for before, _ in parts]),
        masked=torch.cat([first.masked for _, first in parts]),
        truncated=torch.cat([first.truncated for _, first in parts]),
    )
