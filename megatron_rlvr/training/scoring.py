"""The scoring pass of a step: what the policy and the reference say about a rollout, and the advantages that follow."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_rlvr.data.batch import RolloutBatch
from megatron_rlvr.megatron import collectives, device
from megatron_rlvr.objectives import ReferenceKL, group_advantages
from megatron_rlvr.objectives.tokens import saturated
from megatron_rlvr.training.config import AlgorithmConfig
from megatron_rlvr.training.head import TokenScores
from megatron_rlvr.training.policy import Policy
from megatron_rlvr.training.reference import Reference


def score_rollout(
    policy: Policy, reference: Reference | None, batch: RolloutBatch, algorithm: AlgorithmConfig
) -> tuple[TokenScores, Tensor]:
    """Score a rollout before the updates of its step. Collective over the job.

    Args:
        policy: the policy.
        reference: the reference; its log-probs become those of the batch.
        batch: this rank's rollouts.
        algorithm: section ``algorithm`` of the configuration.

    Returns:
        the token scores, and the advantage of each sequence, float32 [N].
    """
    scores = policy.score(batch)
    advantage = group_advantages(batch.shaped_rewards, algorithm.advantage)
    if reference is not None:
        batch.reference_logprob = reference.logprob(batch)
    penalty = algorithm.reference_kl()
    if penalty is not None and penalty.place == "reward":
        advantage = advantage + kl_advantages(penalty, batch, scores, algorithm.advantage)
    advantage = saturated(advantage).flatten()
    return scores.under(advantage[batch.sequence_of_token()]), advantage


def kl_advantages(penalty: ReferenceKL, batch: RolloutBatch, scores: TokenScores, method: str) -> Tensor:
    """Return what a KL penalty in the reward adds to the advantages: float32 [N / G, G].

    It is the penalty of each sequence less the mean of its group or, with ``rloo``, of the others of its group. With
    ``grpo`` it is not divided by a standard deviation: in a group of equal rewards that of the penalties alone would
    remain, and differences of any size would become advantages of size 1.

    Collective over the model-parallel group: one broadcast from the last stage, which alone has the log-probs.
    """
    assert batch.reference_logprob is not None
    sums = torch.zeros(len(batch.rewards), dtype=torch.float64)
    estimate = penalty.estimate(scores.logprob, batch.reference_logprob)
    sums.index_add_(0, batch.sequence_of_token(), estimate)
    shared = sums.to(device.device())
    collectives.broadcast_from_last_stage(shared)
    penalties = saturated(-penalty.coefficient * shared.cpu(), torch.float32).view(-1, batch.group_size)
    return group_advantages(penalties, "rloo" if method == "rloo" else "grpo-no-std")
